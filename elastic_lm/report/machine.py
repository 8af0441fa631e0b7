"""What a measurement ran on: the hardware, and the versions of the packages."""

import importlib.metadata
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

from elastic_lm.config.checks import require

try:
    import resource
except ImportError:  # Windows
    resource = None

RECORDED = ("elastic-lm", "jax", "numpy")  # versions that files of results name
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "xllamacpp")


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB and jax devices."""
    import jax  # late: the command line imports this module for its help

    devices = jax.devices()
    return {
        "platform": platform.platform(),
        "processor": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "backend": devices[0].platform,
        "devices": [d.device_kind for d in devices],
    }


def device_line() -> str:
    """The device that programs run on, for pictures: its kind, and of a CPU the name and the cores."""
    import jax  # late: see above

    first = jax.devices()[0]
    if first.platform != "cpu":
        count = jax.device_count()
        return f"{count} x {first.device_kind}" if count > 1 else str(first.device_kind)
    return f"{_cpu_name()}, {usable_cores()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter to speed."""
    import elastic_lm  # late: it may be importing this module

    found = {"python": platform.python_version(), "elastic-lm": elastic_lm.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def recorded_versions() -> dict[str, str]:
    """Versions of the packages that decide about the numbers of a calibration, for its file."""
    found = versions()
    return {name: found[name] for name in RECORDED}


def memory_bytes() -> int | None:
    """Bytes of memory of this machine, those of its other devices included; None where nothing tells."""
    import jax  # late: see above

    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stats = [device.memory_stats() or {} for device in jax.local_devices() if device.platform != "cpu"]
    return host + sum(int(own.get("bytes_limit", 0)) for own in stats)


def peak_memory_bytes() -> int | None:
    """The most memory that was in use until now, on the fullest device of this process.

    That of the process itself where its devices do not tell, as CPUs; None where nothing tells.
    """
    import jax  # late: see above

    stats = [device.memory_stats() or {} for device in jax.local_devices() if device.platform != "cpu"]
    peaks = [int(own.get("peak_bytes_in_use", own.get("bytes_in_use", 0))) for own in stats]
    if any(peaks):
        return max(peaks)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_in_use_bytes() -> int | None:
    """Memory in use on the fullest device of this process; None where devices do not tell, as CPUs."""
    import jax  # late: see above

    stats = [device.memory_stats() or {} for device in jax.local_devices() if device.platform != "cpu"]
    used = [int(own["bytes_in_use"]) for own in stats if "bytes_in_use" in own]
    return max(used, default=None)


def require_memory(field: str, value: object, needed: float, what: str) -> None:
    """Refuses what cannot fit into the memory of all machines of a run, before any of it is taken.

    Args:
      field: that decides about the size.
      value: of the field.
      needed: bytes.
      what: takes them, such as "its parameters".

    Raises:
      ValueError: names field, value, what is needed and what there is.
    """
    import jax  # late: see above

    memory = memory_bytes()
    there = math.inf if memory is None else memory * jax.process_count()
    fix = f"{what} would take {needed / 2**30:,.0f} GiB, and there are {there / 2**30:,.0f}; make it smaller"
    require(needed <= there, field, value, fix)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)

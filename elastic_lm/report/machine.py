"""What a measurement ran on: the hardware, and the versions of the packages."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("elastic-lm", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "xllamacpp")


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


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter to speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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

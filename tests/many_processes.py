"""Starts real processes that run one program together, over the loopback interface."""

import concurrent.futures
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SECONDS = 400.0  # in which all of them must have ended
CHILD = str(Path(__file__).with_name("one_of_many.py"))


def free_port() -> int:
    """A port that no program listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(process: int, count: int, port: int, devices: int = 1) -> dict[str, str]:
    """The variables of one process of several."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags = " ".join(flag for flag in flags.split() if "device_count" not in flag)
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "ELASTIC_LM_COORDINATOR": f"127.0.0.1:{port}",
        "ELASTIC_LM_PROCESSES": str(count),
        "ELASTIC_LM_PROCESS": str(process),
    }


def together(
    arguments: Sequence[Sequence[str]], *, devices: int = 1, seconds: float = SECONDS
) -> list["subprocess.CompletedProcess[str]"]:
    """Runs `python ARGUMENTS` in several processes at once.

    Args:
      arguments: of each process.
      devices: of each process.
      seconds: after which those that still run are ended, and the test fails.

    Returns:
      What each of them came to, in their order.
    """
    port, end = free_port(), time.monotonic() + seconds
    started = [
        subprocess.Popen(
            [sys.executable, *own],
            env=environment(i, len(arguments), port, devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, own in enumerate(arguments)
    ]
    # All are read at once: one that nobody reads would wait, and the others for it.
    with concurrent.futures.ThreadPoolExecutor(len(started)) as pool:
        said = [pool.submit(process.communicate) for process in started]
        try:
            outputs = [one.result(max(end - time.monotonic(), 0.1)) for one in said]
        finally:
            for process in started:
                process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]

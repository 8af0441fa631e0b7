"""Flags of the commands that run as several processes, and the refusal of the others."""

import argparse
import contextlib
import dataclasses
import os
import sys
import time

from elastic_lm.cli.parser import CommandOptions, require_flag
from elastic_lm.config.checks import AT_LEAST_1, is_whole
from elastic_lm.meeting import (
    COORDINATOR,
    PROCESS,
    PROCESSES,
    TIMEOUT,
    more_than_one,
    slice_of_several,
    start_processes,
)
from elastic_lm.processes import is_first, lost_process

ALONE = "runs as one process"
LAST_WORDS = 2.0  # seconds for errors of the other processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions(CommandOptions):
    """The place of this process among those that run the command together."""

    coordinator: str | None = None  # HOST:PORT of process 0; None = as the variables or the cluster say
    processes: int | None = None  # how many there are
    process: int | None = None  # which one this is
    start_timeout: float = TIMEOUT  # seconds until all must have come

    def __post_init__(self) -> None:
        # Of the other classes that a command's options are made of.
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()
        fix = AT_LEAST_1[1]
        require_flag(
            self.processes is None or is_whole(self.processes, 1), "--processes", self.processes, fix
        )
        require_flag(self.start_timeout > 0, "--start-timeout", self.start_timeout, "must be above 0")

    def start(self) -> int:
        """Connects the processes, and returns their number; does nothing for one."""
        return start_processes(self.coordinator, self.processes, self.process, timeout=self.start_timeout)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ProcessOptions`."""
    group = parser.add_argument_group(
        "several processes",
        "Each runs this command with the same arguments. Cloud TPU, GKE, Slurm and Open MPI need no flags.",
    )
    add = group.add_argument
    text = f"address of process 0 that all others reach, with a free port (variable {COORDINATOR})"
    add("--coordinator", metavar="HOST:PORT", help=text)
    text = f"how many there are (variable {PROCESSES}); 1 = this one, whatever the cluster says"
    add("--processes", type=int, metavar="N", help=text)
    text = f"which one this is, from 0 (variable {PROCESS})"
    add("--process", type=int, metavar="I", help=text)
    text = f"until all must have come (default: {ProcessOptions.start_timeout:g})"
    add("--start-timeout", type=float, metavar="SECONDS", help=text)


def leave(status: int) -> None:
    """Lets the other processes speak first where a command of several was refused.

    Process 0 connects them: its end would break them off in the middle of their own last words.

    Args:
      status: of the command.
    """
    if status and _Together.first:
        time.sleep(LAST_WORDS)


def lost(error: BaseException) -> str:
    """What to tell where a command of several breaks off because another process has ended; "" = it does not.

    Args:
      error: what the command raised.
    """
    reason = lost_process(error) if _Together.several else ""
    return reason and f"another process has ended or cannot be reached any more: see what it said ({reason})"


class _Together:
    """This process, once it is one of several."""

    several = False
    first = False  # it connects the others


def start(command: str, options: CommandOptions) -> None:
    """Connects the processes of a command, of which the first one prints, or refuses several of another one.

    Args:
      command: as it is typed.
      options: of the command.

    Raises:
      OSError: see `elastic_lm.processes.start_processes`.
      ValueError: likewise, or the command runs as one process and the environment has several.
    """
    if isinstance(options, ProcessOptions):
        if options.start() == 1:
            return
        _Together.several, _Together.first = True, is_first()
        _print_alone(_Together.first)
        return
    several = more_than_one() or slice_of_several()
    if several:
        raise ValueError(
            f"{command} {ALONE}, and {several} says that there are more: start it once, outside of srun, "
            f"mpirun and --worker=all, or set {PROCESSES}=1"
        )


def _print_alone(first: bool) -> None:
    """Lets the first process alone print, and keeps out what gloo tells of its connections."""
    with contextlib.suppress(OSError, ValueError):  # no file of the system, as in tests
        sys.stdout.flush()
        own = os.dup(sys.stdout.fileno()) if first else os.open(os.devnull, os.O_WRONLY)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)  # noqa: SIM115
        return
    if not first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process

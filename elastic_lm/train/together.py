"""What the processes of a run do together: save by one clock, stop at one step, notice that one is gone.

In one process nothing here waits, gathers or asks anybody.
"""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from elastic_lm.processes import LostProcess, lost_process, settle


class SaveClock:
    """Whether so many minutes have passed since the last checkpoint, or since the run began."""

    def __init__(self, minutes: float) -> None:
        """Starts the clock.

        Args:
          minutes: between checkpoints; 0 = never.
        """
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """A checkpoint was written."""
        self._began = time.monotonic()

    def rings(self) -> bool:
        """Whether the time is over."""
        return bool(self._seconds) and time.monotonic() - self._began >= self._seconds


def agreed(stop: bool, save: bool, due: bool) -> tuple[bool, bool]:
    """Whether all processes stop here, and whether they save here.

    Args:
      stop: this process was asked to stop; one that was is enough.
      save: its clock says that it is time for a checkpoint; that of process 0 counts.
      due: something is written at this step, so that the processes wait for each other anyway.
    """
    if jax.process_count() == 1:
        return stop, save
    if not due:
        return False, False
    settle()
    wishes = multihost_utils.process_allgather(np.asarray([stop, save]))
    return bool(wishes[:, 0].any()), bool(wishes[0, 1])


def preempted(step: int) -> bool:
    """Whether one of several processes got SIGTERM and this is the step at which all of them stop.

    jax chooses it: the first that no process has reached. It notices the signal within a second, costs no
    collective, and must be asked at every step.

    Args:
      step: the same in all processes.
    """
    if jax.process_count() == 1:
        return False
    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # jax_enable_preemption_service is off
        return False


@contextlib.contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Says in words that another process is gone, which a collective or a barrier says in those of a library.

    Raises:
      LostProcess: with the fix.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = lost_process(error)
        if not reason:
            raise
        raise LostProcess(
            f"another process of this run has ended or cannot be reached ({reason}); see what it printed, "
            "and start all of them again: the run goes on from its last checkpoint"
        ) from error

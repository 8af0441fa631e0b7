"""Traces of some steps of a run, by JAX's profiler."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from elastic_lm.config.checks import require
from elastic_lm.config.log import profiled_steps
from elastic_lm.report.profile import how_to_look

FOLDER = "profile"  # of the workdir
WARM = 2  # steps of a start before a count of steps begins: the first ones compile


def check_profile(profile: str, steps: int) -> None:
    """Refuses steps that a run does not have.

    Args:
      profile: `LogConfig.profile`.
      steps: of the run.

    Raises:
      ValueError: names the field.
    """
    _, last = profiled_steps(profile)
    require(
        last <= steps, "log.profile", profile, f"the run has train.steps={steps}; name fewer or earlier ones"
    )


class Profile:
    """Traces the steps that `log.profile` names; of several processes, the first one does."""

    def __init__(self, profile: str = "", folder: Path = Path(), start: int = 0, steps: int = 0) -> None:
        """Nothing is traced yet.

        Args:
          profile: `LogConfig.profile`.
          folder: of the run; the trace goes into a folder in it.
          start: steps done before.
          steps: of the run.
        """
        self._folder = folder / FOLDER
        self._running = False
        self._step: Any = None
        self._first, self._last = 1, 0
        if not profile or jax.process_index():
            return

        first, last = profiled_steps(profile)
        if first is None:
            first = max(min(start + 1 + WARM, steps - last + 1), start + 1)
            last = min(first + last - 1, steps)
        self._first, self._last = max(first, start + 1), last
        if start < steps and self._last <= start:
            print(f"log.profile={profile}: these steps were done before; nothing is traced", flush=True)

    def before(self, step: int) -> None:
        """Begins a trace before its first step."""
        if step == self._first <= self._last:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        if self._running:
            self._step = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._step.__enter__()

    def after(self, step: int, metrics: Mapping[str, Any]) -> float:
        """Ends a trace after its last step, whose metrics are waited for.

        Returns:
          Seconds that writing it took.
        """
        if not self._running:
            return 0.0
        self._step.__exit__(None, None, None)
        if step != self._last:
            return 0.0
        jax.block_until_ready(metrics)
        began = time.monotonic()
        self.close()
        print(f"steps {self._first} to {self._last} are traced; {how_to_look(self._folder)}", flush=True)
        return time.monotonic() - began

    def close(self) -> None:
        """Ends a trace that still runs, where a run ends before its last step."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

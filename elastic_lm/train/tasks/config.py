"""Options of a run that learns a task from labelled records."""

import dataclasses
import math
from typing import Any, Literal, get_args

from elastic_lm.config.checks import NOT_NEGATIVE, POSITIVE, require, require_choice, require_each
from elastic_lm.train.method import MethodConfig

Tuned = Literal["all", "head", "exits"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskTuningConfig(MethodConfig):
    """Options of `TaskTuning`, and of `SequenceToSequence` for tasks whose answer is a text.

    Example:
      ```python
      import elastic_lm as el

      method = el.train.TaskTuningConfig(teacher_from="runs/super/model", distil=0.5)
      ```
    """

    data = "records"

    name: str = "task_tuning"
    teacher_from: str = ""  # folder of the model that it learns from; "" = none
    distil: float = 0.0  # d
    temperature: float = 1.0  # T
    z_loss: float = 0.0  # z; 1e-4 makes energies comparable
    tuned: Tuned = "all"  # or the task's head (with its pooler), or the exits; everything else stays as it is
    exit_weights: tuple[float, ...] = ()  # w_i of every exit; () = all 1

    def __post_init__(self) -> None:
        require_choice("method.tuned", self.tuned, get_args(Tuned))

        require(0 <= self.distil <= 1, "method.distil", self.distil, "must be a share in [0, 1]")
        require_each(self, "method.", ("temperature",), *POSITIVE)
        require_each(self, "method.", ("z_loss",), *NOT_NEGATIVE)

        finite = all(0 <= weight < math.inf for weight in self.exit_weights)
        require(finite, "method.exit_weights", self.exit_weights, "must not be negative")

    def check(self, run: Any) -> None:
        """Refuses options that the task does not read."""
        require(
            (self.distil > 0) == bool(self.teacher_from),
            "method.distil",
            self.distil,
            f"goes with method.teacher_from={self.teacher_from!r}: give both, or neither",
        )

        problem, writes = run.task.problem, run.task.problem == "text_to_text"
        require(
            not writes or self.tuned == "all",
            "method.tuned",
            self.tuned,
            "text_to_text tunes every parameter; set 'all'",
        )

        require(
            problem != "regression" or not self.z_loss,
            "method.z_loss",
            self.z_loss,
            "is about classes and texts: a regression's output has no normaliser; set 0",
        )

        require(
            self.tuned != "head" or not run.exits,
            "exits",
            run.exits,
            "these exits do not train with method.tuned='head'; set 'all' or 'exits'",
        )
        require(
            (not writes and self.tuned != "head") or not self.exit_weights,
            "method.exit_weights",
            self.exit_weights,
            "are of exits that train, and there are none; leave them out",
        )

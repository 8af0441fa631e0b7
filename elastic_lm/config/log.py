"""Where the numbers of a run are written."""

import dataclasses
import re

from elastic_lm.config.checks import require, require_not_negative, require_types

WRITERS = ("jsonl", "tensorboard", "wandb")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where the numbers of a run are written, beside the terminal.

    Example:
      ```python
      import elastic_lm as el

      log = el.LogConfig(writers=("jsonl", "tensorboard"))
      assert "wandb" not in log.writers
      ```
    """

    writers: tuple[str, ...] | None = (
        None  # of jsonl, tensorboard, wandb, module:Class; None = the first two, if installed
    )
    project: str = ""  # wandb: project of the run; "" = as WANDB_PROJECT says
    name: str = ""  # wandb: name of the run; "" = that of the workdir
    profile: str = ""  # steps traced into WORKDIR/profile: FIRST:LAST, or a count; "" = none
    peak_tflops: float = 0.0  # of one device in bfloat16, for `mfu`; 0 = as published, where it is known

    def __post_init__(self) -> None:
        require_types(self, "log.")
        for i, writer in enumerate(self.writers or ()):
            module, colon, attribute = writer.partition(":")
            own = bool(module and colon and attribute)
            fix = f"must be one of {', '.join(WRITERS)}, or module:Class"
            require(own or writer in WRITERS, f"log.writers[{i}]", writer, fix)
        require_not_negative("log.peak_tflops", self.peak_tflops)
        profiled_steps(self.profile)
        twice = len(set(self.writers or ())) < len(self.writers or ())
        require(not twice, "log.writers", self.writers, "names a writer twice; name each once")
        for field in ("project", "name"):
            value = getattr(self, field)
            used = "wandb" in (self.writers or ())
            require(
                used or not value,
                f"log.{field}",
                value,
                "is read by the writer wandb alone; name it in log.writers",
            )


def profiled_steps(profile: str, field: str = "log.profile") -> tuple[int | None, int]:
    """What `LogConfig.profile` says.

    Args:
      profile: "FIRST:LAST", a count, or "".
      field: for messages.

    Returns:
      (first step or None, last step or the count); (None, 0) = none.

    Raises:
      ValueError: it is something else; names the field.
    """
    found = re.fullmatch(r"(?:([1-9]\d{0,8}):)?([1-9]\d{0,8})", profile)
    fix = "must be FIRST:LAST, such as 10:13, or a count of steps, such as 3"
    require(found is not None or not profile, field, profile, fix)
    if found is None:
        return None, 0
    first, last = int(found[1]) if found[1] else None, int(found[2])
    require(first is None or first <= last, field, profile, "the first step comes after the last")
    return first, last

"""Where the numbers of a run are written."""

import dataclasses

from elastic_lm.config.checks import require, require_types

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

    def __post_init__(self) -> None:
        require_types(self, "log.")
        for i, writer in enumerate(self.writers or ()):
            module, colon, attribute = writer.partition(":")
            own = bool(module and colon and attribute)
            fix = f"must be one of {', '.join(WRITERS)}, or module:Class"
            require(own or writer in WRITERS, f"log.writers[{i}]", writer, fix)
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

"""What a task is and how it is learned: frozen, validated, static like everything in `elastic_lm.config`."""

import dataclasses
from typing import Literal, get_args

from elastic_lm.config.checks import (
    AT_LEAST_1,
    require,
    require_choice,
    require_each,
    require_seed,
    require_types,
)

TaskProblem = Literal["classification", "regression", "text_to_text"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Labelled records, and which of their fields are read and learned.

    Example:
      ```python
      import elastic_lm as el

      task = el.TaskConfig(paths=("train.jsonl",), text_field="review", labels=("bad", "good"))
      assert task.problem == "classification"
      ```
    """

    problem: TaskProblem = "classification"  # a class, a number, or a text for every record
    paths: tuple[str, ...] = ()  # training files or folders: JSON lines, CSV or TSV, also .gz
    eval_paths: tuple[str, ...] = ()  # held-out files or folders
    text_field: str = "sentence"  # key of what is read
    pair_field: str = ""  # key of a second text, read after the first; "" = none
    label_field: str = "label"  # key of the class, the number, or the text to write
    labels: tuple[str, ...] = ()  # classes by their names in the files; () = those found, sorted
    prefix: str = ""  # encoder-decoders: put before every text, like "translate English to German: "
    max_len: int = 128  # tokens of a text or pair, the rest is cut off
    max_target: int = 64  # text_to_text: tokens of the text to write, the rest is cut off
    batch_size: int = 32  # records per optimizer step, over all devices
    tokenizer: str = ""  # folder or tokenizer.json; "" = that of train.init_from
    seed: int | None = None  # of the order of the records; None = train.seed

    def __post_init__(self) -> None:
        require_types(self, "task.")
        require_choice("task.problem", self.problem, get_args(TaskProblem))
        require_each(self, "task.", ("max_len", "max_target", "batch_size"), *AT_LEAST_1)
        require_seed("task.seed", self.seed)
        require(bool(self.paths), "task.paths", self.paths, "name the training files")
        for field in ("text_field", "label_field"):
            require(bool(getattr(self, field)), f"task.{field}", "", "name the key in the files")
        named = all(label and label == label.strip() for label in self.labels)
        require(named, "task.labels", self.labels, "every class needs a name without white space around it")
        distinct = len(set(self.labels)) == len(self.labels)
        require(distinct, "task.labels", self.labels, "names a class twice; name each once")
        classes = self.problem == "classification"
        fix = f"not read with task.problem={self.problem!r}; leave it out"
        require(classes or not self.labels, "task.labels", self.labels, fix)
        writes = self.problem == "text_to_text"
        require(writes or classes or not self.prefix, "task.prefix", self.prefix, fix)
        require(not writes or not self.pair_field, "task.pair_field", self.pair_field, fix)

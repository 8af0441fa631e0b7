"""What a task is and how it is learned: frozen, validated, static like everything in `elastic_lm.config`."""

import dataclasses
from typing import Literal, get_args

from elastic_lm.config import MeshConfig
from elastic_lm.encoder_config import EncoderConfig
from elastic_lm.encoder_decoder_config import EncoderDecoderConfig
from elastic_lm.plain import AT_LEAST_1, SEED, require, require_choice, require_each
from elastic_lm.train_config import TrainConfig

Problem = Literal["classification", "regression", "text_to_text"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Labelled records, and which of their fields are read and learned."""

    problem: Problem = "classification"  # a class, a number, or a text for every record
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
    seed: int = 0  # of the shuffle

    def __post_init__(self) -> None:
        require_choice("task.problem", self.problem, get_args(Problem))
        require_each(self, "task.", ("max_len", "max_target", "batch_size"), *AT_LEAST_1)
        require_each(self, "task.", ("seed",), *SEED)
        require(bool(self.paths), "task.paths", self.paths, "name the training files")
        for field in ("text_field", "label_field"):
            require(bool(getattr(self, field)), f"task.{field}", "", "name the key in the files")
        distinct = len(set(self.labels)) == len(self.labels)
        require(distinct, "task.labels", self.labels, "names a class twice; name each once")
        classes = self.problem == "classification"
        fix = f"not read with task.problem={self.problem!r}; leave it out"
        require(classes or not self.labels, "task.labels", self.labels, fix)
        writes = self.problem == "text_to_text"
        require(writes or classes or not self.prefix, "task.prefix", self.prefix, fix)
        require(not writes or not self.pair_field, "task.pair_field", self.pair_field, fix)


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """Everything that `elastic-lm train` needs to learn a task; a config with a `task` section mirrors it."""

    task: TaskConfig
    train: TrainConfig
    encoder: EncoderConfig | None = None  # a new encoder; None = the model of train.init_from
    encoder_decoder: EncoderDecoderConfig | None = None  # a new encoder-decoder, likewise
    exits: tuple[int, ...] = ()  # layers of an encoder with a head of their own; () = those that it has
    mesh: MeshConfig = dataclasses.field(default=MeshConfig())

    def __post_init__(self) -> None:
        method = self.train.method
        fix = "a config with a task section has task_tuning"
        require(method == "task_tuning", "train.method", method, fix)
        new = [model for model in (self.encoder, self.encoder_decoder) if model is not None]
        fix = "name a model to start from, or describe one under encoder or encoder_decoder: one of them"
        require(bool(self.train.init_from) + len(new) == 1, "train.init_from", self.train.init_from, fix)
        fix = "a new encoder has none of its own: name a folder or a tokenizer.json"
        known = self.encoder is None or bool(self.task.tokenizer)
        require(known, "task.tokenizer", self.task.tokenizer, fix)
        writes = self.task.problem == "text_to_text"
        fix = "an encoder writes no text, and an encoder-decoder is made to: change one of the two"
        right = not new or writes == (self.encoder is None)
        require(right, "task.problem", self.task.problem, fix)
        fix = "text_to_text tunes every parameter; set 'all'"
        require(not writes or self.train.tuned == "all", "train.tuned", self.train.tuned, fix)
        fix = "is about classes and texts: a regression's output has no normaliser; set 0"
        right = self.task.problem != "regression" or not self.train.z_loss
        require(right, "train.z_loss", self.train.z_loss, fix)
        layers, fix = self.train.init_layers, "layers are kept of encoders only; set 0"
        require(not writes or not layers, "train.init_layers", layers, fix)
        fix = "are heads that tell classes apart or give numbers, and texts are written; leave them out"
        require(not writes or not self.exits, "exits", self.exits, fix)
        fix = "these exits do not train with train.tuned='head'; set 'all' or 'exits'"
        require(self.train.tuned != "head" or not self.exits, "exits", self.exits, fix)
        weights, fix = self.train.exit_weights, "are of exits that train, and there are none; leave them out"
        read = not writes and self.train.tuned != "head"
        require(read or not weights, "train.exit_weights", weights, fix)
        rows, parts = self.task.batch_size, self.train.accumulate
        require(rows % parts == 0, "train.accumulate", parts, f"must divide task.batch_size={rows}")

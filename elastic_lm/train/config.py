"""What a training run is: frozen, validated dataclasses, static under `jit` as in `elastic_lm.config`.

A config has one section per dataclass. `train` holds what every run has; what a single method reads is in
`method`, whose class belongs to the method (`elastic_lm.train.method`).
"""

import dataclasses
from typing import Literal, get_args

from elastic_lm.config.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    require,
    require_choice,
    require_each,
    require_seed,
    require_types,
)
from elastic_lm.config.data import DataConfig
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.log import LogConfig
from elastic_lm.config.mesh import MeshConfig
from elastic_lm.config.model import DTYPES, ExitConfig, ModelConfig
from elastic_lm.config.task import TaskConfig
from elastic_lm.nn.kernels import AttentionKernel
from elastic_lm.nn.remat import Remat, check_remat, is_recomputing
from elastic_lm.train.losses import LOSS_CHUNK
from elastic_lm.train.method import MethodConfig
from elastic_lm.train.pretraining import PretrainingConfig
from elastic_lm.train.registry import method_class, names_with
from elastic_lm.train.tasks.config import TaskTuningConfig

Schedule = Literal["cosine", "linear", "wsd", "constant"]
Optimizer = Literal["adamw", "muon", "adafactor"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimizer and bookkeeping of one training run, whatever its method.

    Example:
      ```python
      import elastic_lm as el

      train = el.TrainConfig(init_from="models/SmolLM2-135M", steps=1000, lr=1e-3)
      assert train.schedule == "cosine"
      ```
    """

    init_from: str = ""  # folder, name on the Hub or .gguf file to start from; "" = random
    init_layers: int = 0  # layers kept of init_from, the lowest, without its exits; 0 = everything
    param_dtype: str = ""  # of all parameters; "" = float32 for those that train, the others as loaded
    mu_dtype: str = ""  # dtype of the optimizer's mean gradient; "" = float32, as everything else of it
    nu_dtype: str = ""  # dtype of its mean squared gradient: bfloat16 needs b2 <= 0.996; "" = float32
    dtype: str = ""  # dtype of activations; "" = that of the model
    steps: int = 1000  # optimizer steps
    optimizer: Optimizer = "adamw"  # muon: orthogonalised updates of layers' kernels; adafactor: less memory
    lr: float = 3e-4  # peak learning rate
    schedule: Schedule = "cosine"  # shape after the warm-up
    warmup: int = 100  # steps of linear warm-up
    min_lr: float = 0.1  # final learning rate as a share of the peak
    decay_share: float = 0.2  # wsd: share of the steps that decay linearly at the end
    b1: float = 0.9  # AdamW, and muon's AdamW part only: memory of the mean gradient
    b2: float = 0.95  # AdamW, and muon's AdamW part only: memory of the squared gradient
    eps: float = 1e-8  # AdamW: added to the root
    weight_decay: float = 0.1  # AdamW: on kernels and tables, not on norms and biases
    clip: float = 1.0  # largest global norm of the gradient; 0 = off
    accumulate: int = 1  # parts a batch is computed in, one after the other
    remat: Remat = False  # computed again in the backward pass: none, dots, dots_no_batch or full (= True)
    attention: AttentionKernel = "auto"  # auto: splash on TPUs, else xla; cudnn: GPUs, half precision
    loss_chunk: int = LOSS_CHUNK  # columns of logits alive at once
    seed: int | None = None  # of what is drawn: parameters, sub-models, dropped layers; None = the run's seed
    log_every: int = 10  # steps between metric lines
    eval_every: int = 500  # steps between held-out evaluations; 0 = only at the end
    eval_batches: int = 20  # batches per held-out evaluation; 0 = all there are
    save_every: int = 500  # steps between checkpoints
    save_minutes: float = 0.0  # minutes between checkpoints, whatever the steps; 0 = by steps alone
    keep: int = 2  # newest checkpoints that are kept
    keep_period: int = 0  # checkpoints of its multiples are kept as well; 0 = none are

    def __post_init__(self) -> None:
        require_types(self, "train.")
        for field in ("param_dtype", "mu_dtype", "dtype"):
            require_choice(f"train.{field}", getattr(self, field), ("", *DTYPES))
        self._check_moments()
        require_choice("train.schedule", self.schedule, get_args(Schedule))
        require_choice("train.attention", self.attention, get_args(AttentionKernel))
        require_choice("train.optimizer", self.optimizer, get_args(Optimizer))

        counts = ("steps", "accumulate", "log_every", "save_every", "keep", "loss_chunk")
        require_each(self, "train.", counts, *AT_LEAST_1)
        require_each(self, "train.", ("lr", "eps"), *POSITIVE)
        require_each(self, "train.", ("b1", "b2"), lambda v: 0 <= v < 1, "must be in [0, 1)")
        zero_allowed = (
            *("clip", "weight_decay", "eval_every", "eval_batches", "init_layers"),
            *("save_minutes", "keep_period"),
        )
        require_each(self, "train.", zero_allowed, *NOT_NEGATIVE)
        require_seed("train.seed", self.seed)
        check_remat("train.remat", self.remat)

        below = f"must be below steps={self.steps}"
        require(0 <= self.warmup < self.steps, "train.warmup", self.warmup, below)
        require(0 <= self.min_lr <= 1, "train.min_lr", self.min_lr, "is a share of lr, in [0, 1]")
        share = "is a share of steps, in [0, 1]"
        require(0 <= self.decay_share <= 1, "train.decay_share", self.decay_share, share)
        require(
            not self.init_layers or bool(self.init_from),
            "train.init_layers",
            self.init_layers,
            "keeps layers of a checkpoint: name it in train.init_from",
        )

    def _check_moments(self) -> None:
        """Refuses dtypes in which the optimizer's memory would not do what it is for."""
        if self.optimizer == "adafactor":
            fix = "adafactor keeps squares by rows and columns in float32, and no mean; leave it out"
            require(not self.mu_dtype, "train.mu_dtype", self.mu_dtype, fix)
            require(not self.nu_dtype, "train.nu_dtype", self.nu_dtype, fix)

        require(
            self.nu_dtype in ("", "float32", "bfloat16"),
            "train.nu_dtype",
            self.nu_dtype,
            "must be float32 or bfloat16: squares of small gradients are 0 in float16",
        )
        # Rounded to 8 bits, b2 * nu has to be less than nu for every nu, or it never falls again.
        require(
            self.nu_dtype != "bfloat16" or 1 - self.b2 > 2**-8,
            "train.nu_dtype",
            self.nu_dtype,
            f"with b2={self.b2} a squared gradient in bfloat16 would never fall again: set b2 to 0.996 or "
            "less, or float32",
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run of a decoder on text: what `elastic-lm train` needs; recipes give such runs.

    Example:
      ```python
      import elastic_lm as el

      run = el.RunConfig(
          exits=(el.ExitConfig(9, kind="norm"),),
          method=el.depth.EETuningConfig(warmup_steps=50),
          train=el.TrainConfig(init_from=str(el.embedded_model()), steps=200),
      )
      assert run.method.name == "ee_tuning"
      ```
    """

    model: ModelConfig | None = None  # architecture; None = that of train.init_from
    exits: tuple[ExitConfig, ...] = ()  # exits attached before training
    data: DataConfig = dataclasses.field(default=DataConfig())
    method: MethodConfig = dataclasses.field(default=PretrainingConfig())
    train: TrainConfig = dataclasses.field(default=TrainConfig())
    mesh: MeshConfig = dataclasses.field(default=MeshConfig())
    log: LogConfig = dataclasses.field(default=LogConfig())
    seed: int = 0  # of everything that is random, unless train.seed or the data's seed is set apart

    def __post_init__(self) -> None:
        require_types(self)
        require_seed("seed", self.seed)
        _check_method(self.method, self.train, "text")
        self.method.check(self)
        require(
            self.model is not None or bool(self.train.init_from),
            "model",
            self.model,
            "describe a model, or name a checkpoint in train.init_from",
        )

        drawn = self.model.exits if self.model and not self.train.init_from else ()
        where = "exits" if self.exits else "model.exits"
        # Only a message asks for the methods with an ability: that imports the modules of all methods.
        if (self.exits or drawn) and not self.method.trains_exits:
            raise ValueError(
                f"method.name={self.method.name!r}: trains no exits: choose {names_with('trains_exits')}, "
                f"or leave {where} out"
            )
        for e in (*drawn, *self.exits):
            if e.gate and not self.method.trains_gates:
                raise ValueError(
                    f"{e.name}.gate={e.gate!r}: method.name={self.method.name!r} trains no gates: choose "
                    f"{names_with('trains_gates')}, or set 0"
                )

        rows = self.data.batch_size
        require(
            rows % self.train.accumulate == 0,
            "train.accumulate",
            self.train.accumulate,
            f"must divide data.batch_size={rows}",
        )


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """A run of an encoder or encoder-decoder on labelled records: a config with a `task` section.

    Example:
      ```python
      import elastic_lm as el

      run = el.TaskRun(
          task=el.TaskConfig(paths=("train.jsonl",), text_field="review"),
          train=el.TrainConfig(init_from="models/bert-base-uncased"),
      )
      assert run.method.name == "task_tuning"
      ```
    """

    task: TaskConfig
    train: TrainConfig
    method: MethodConfig = dataclasses.field(default=TaskTuningConfig())
    encoder: EncoderConfig | None = None  # a new encoder; None = the model of train.init_from
    encoder_decoder: EncoderDecoderConfig | None = None  # a new encoder-decoder, likewise
    exits: tuple[int, ...] = ()  # layers of an encoder with a head of their own; () = those that it has
    mesh: MeshConfig = dataclasses.field(default=MeshConfig())
    log: LogConfig = dataclasses.field(default=LogConfig())
    seed: int = 0  # of everything that is random, unless train.seed or the data's seed is set apart

    def __post_init__(self) -> None:
        require_types(self)
        require_seed("seed", self.seed)
        _check_method(self.method, self.train, "records")

        new = [model for model in (self.encoder, self.encoder_decoder) if model is not None]
        require(
            bool(self.train.init_from) + len(new) == 1,
            "train.init_from",
            self.train.init_from,
            "name a model to start from, or describe one under encoder or encoder_decoder: one of them",
        )

        require(
            self.encoder is None or bool(self.task.tokenizer),
            "task.tokenizer",
            self.task.tokenizer,
            "a new encoder has none of its own: name a folder or a tokenizer.json",
        )

        writes = self.task.problem == "text_to_text"
        require(
            self.encoder is None or not writes,
            "task.problem",
            self.task.problem,
            "an encoder cannot write text: use encoder_decoder, or another problem",
        )
        require(
            self.encoder_decoder is None or writes,
            "task.problem",
            self.task.problem,
            "a new encoder_decoder learns to write: use encoder, or problem 'text_to_text'",
        )

        require(
            not writes or not self.train.init_layers,
            "train.init_layers",
            self.train.init_layers,
            "layers are kept of encoders only; set 0",
        )
        require(
            not writes or not self.exits,
            "exits",
            self.exits,
            "exits are heads for classes or numbers, and a text_to_text task has none: leave them out",
        )

        require(
            self.mesh.sequence == 1,
            "mesh.sequence",
            self.mesh.sequence,
            "records are padded to lengths of their own, whose columns are not divided; set 1",
        )

        require(
            self.train.attention in ("auto", "xla"),
            "train.attention",
            self.train.attention,
            "is a kernel for causal attention over text, and these models have another; set 'auto'",
        )

        rows, parts = self.task.batch_size, self.train.accumulate
        require(rows % parts == 0, "train.accumulate", parts, f"must divide task.batch_size={rows}")
        self.method.check(self)


def _check_method(method: MethodConfig, train: TrainConfig, data: str) -> None:
    """Refuses a method that reads other data, and options of `train` that it does not read."""
    require_types(method, "method.")
    sections = {"text": "data", "records": "task"}
    require(
        method.data == data,
        "method.name",
        method.name,
        f"reads {method.data}: give the config a section {sections[method.data]!r} instead of "
        f"{sections[data]!r}, or choose another method",
    )

    # A method that can recompute layers has an option of that name, which `train.remat` fills.
    recomputes = any(field.name == "remat" for field in dataclasses.fields(method_class(method.name)))  # pyright: ignore[reportArgumentType]
    require(
        recomputes or not is_recomputing(train.remat),
        "train.remat",
        train.remat,
        f"not read with method.name={method.name!r}; set False",
    )


def with_seeds(config: RunConfig | TaskRun) -> RunConfig | TaskRun:
    """A run whose seeds are all set: `train.seed` follows `seed`, and the order of the data `train.seed`.

    Args:
      config: a run; its own seeds stay None where they follow, so that a change of one is a change of all.
    """
    seed = config.seed if config.train.seed is None else config.train.seed
    train = dataclasses.replace(config.train, seed=seed)
    section = "task" if isinstance(config, TaskRun) else "data"
    data = getattr(config, section)
    if data.seed is None:
        data = dataclasses.replace(data, seed=seed)
    return dataclasses.replace(config, train=train, **{section: data})

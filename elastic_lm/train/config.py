"""How a model is trained: static, like everything in `elastic_lm.config`."""

import dataclasses
import math
from typing import Literal, get_args

from elastic_lm.config.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    require,
    require_choice,
    require_defaults,
    require_each,
    require_shares,
)
from elastic_lm.config.data import DataConfig
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.mesh import MeshConfig
from elastic_lm.config.model import DTYPES, ExitConfig, ModelConfig
from elastic_lm.config.task import TaskConfig
from elastic_lm.train.losses import Objective

MethodName = Literal[
    "pretraining",
    "ee_tuning",
    "joint",
    "sorted_finetuning",
    "self_supervised_exits",
    "flextron",
    "routers",
    "task_tuning",
]
DepthWeights = Literal["uniform", "linear", "sum", "sqrt", "inverse", "inverse_sqrt", "layerskip"]
Curriculum = Literal["all", "sampled", "rotational", "gradual"]
Draw = Literal["per_layer", "uniform", "one_per_step"]
TeacherKind = Literal["live", "frozen"]
Scheme = Literal["end_to_end", "surrogate"]
RoutersRead = Literal["budget", "hidden"]
Priced = Literal["parameters", "flops", "memory_bytes", "latency_ms"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
Optimizer = Literal["adamw", "muon"]
Tuned = Literal["all", "head", "exits"]


SORTED = ("depths", "depth_weights", "depth_scale", "curriculum", "curriculum_period", "layer_dropout")
SELF_SUPERVISED = ("objective", "top_k", "imitation", "cached_batches", "balance_gates")
MENU = ("menu_mlp", "menu_heads", "menu_groups", "menu_dropped")
SAMPLED = ("samples", "smallest_share", "teacher")
ROUTED = ("budgets", "priced", "latency_table", "context", "scheme", "reads", "router_width", "router_lr")
ROUTED += ("budget_weight", "train_model", "surrogate_error")
# Options of TrainConfig, the field that decides whether they are read, and its values that have them read.
READ_WITH = (
    (("exit_warmup", "confidence_weighted"), "method", ("ee_tuning", "joint")),
    (("exit_weights",), "method", ("ee_tuning", "joint", "task_tuning")),
    ((*SORTED, "dropout_ramp"), "method", ("sorted_finetuning",)),
    (SELF_SUPERVISED, "method", ("self_supervised_exits",)),
    ((*MENU, "draw", *SAMPLED, "elastic_groups", "rank_batches"), "method", ("flextron",)),
    (ROUTED, "method", ("routers",)),
    (("distil",), "method", ("flextron", "routers", "task_tuning")),
    (("teacher_from", "temperature", "z_loss", "tuned"), "method", ("task_tuning",)),
    (("remat",), "method", ("pretraining", "ee_tuning", "joint", "sorted_finetuning", "flextron", "routers")),
    (("curriculum_period",), "curriculum", ("rotational", "gradual")),
    (("top_k",), "objective", ("kl",)),
    (("imitation",), "objective", ("penalised",)),
    ((*SAMPLED, "distil"), "draw", ("per_layer", "uniform")),
    (("train_model", "distil"), "scheme", ("end_to_end",)),
    (("surrogate_error",), "scheme", ("surrogate",)),
    (("latency_table",), "priced", ("latency_ms",)),
    (("context",), "priced", ("flops", "memory_bytes")),
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Method, optimizer and bookkeeping of one training run."""

    method: MethodName = "pretraining"  # what trains, and on which loss: see `elastic_lm.methods`
    init_from: str = ""  # Hugging Face folder or elastic checkpoint to start from; "" = random
    init_layers: int = 0  # layers kept of init_from, the lowest, without its exits; 0 = everything
    param_dtype: str = ""  # dtype of parameters read from init_from; "" = as `load` gives them
    dtype: str = ""  # dtype of activations; "" = that of the model
    steps: int = 1000  # optimizer steps
    optimizer: Optimizer = "adamw"  # muon: orthogonalised updates of the layers' kernels, AdamW for the rest
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
    remat: bool = False  # recompute layers in the backward pass: less memory, more time
    loss_chunk: int = 256  # columns of logits alive at once
    exit_weights: tuple[float, ...] = ()  # ee_tuning, joint, task_tuning: loss weight per exit; () = all 1
    exit_warmup: int = 0  # ee_tuning, joint: steps over which the exits' weights rise from 0
    confidence_weighted: bool = False  # ee_tuning, joint: weight tokens by the exit's max probability
    depths: tuple[int, ...] = ()  # sorted_finetuning: layers of the sub-models; () = every layer
    depth_weights: DepthWeights = "uniform"  # sorted_finetuning: loss weight of a sub-model by its layers
    depth_scale: float = 1.0  # sorted_finetuning: weight of the smaller sub-models against the full one
    curriculum: Curriculum = "all"  # sorted_finetuning: which sub-models train in a step
    curriculum_period: int = 0  # rotational: one in so many sub-models a step; gradual: steps per sub-model
    layer_dropout: float = 0.0  # sorted_finetuning: probability that a row skips the last layer
    dropout_ramp: int = 0  # sorted_finetuning: steps over which layer dropout rises; 0 = none
    objective: Objective = "kl"  # self_supervised_exits: what an exit learns from the full model
    top_k: int = 0  # self_supervised_exits, kl: over the full model's likeliest tokens only; 0 = all
    imitation: float = 0.9  # self_supervised_exits, penalised: share of imitation, the rest is the penalty
    cached_batches: int = 0  # self_supervised_exits: batches whose frozen layers run only once; 0 = off
    balance_gates: bool = True  # self_supervised_exits: right and wrong exits weigh the same for a gate
    menu_mlp: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # flextron: shares of MLP neurons to choose from
    menu_heads: tuple[float, ...] = (1.0,)  # flextron: shares of query heads in every key/value group
    menu_groups: tuple[float, ...] = (1.0,)  # flextron: shares of key/value groups, with all their heads
    menu_dropped: tuple[int, ...] = ()  # flextron: layers, from 0, left out first to last; () = none
    draw: Draw = "per_layer"  # flextron: random widths of a step; one_per_step: without the full model
    samples: int = 2  # flextron, beside the full model: random sub-networks of a step
    smallest_share: float = 0.5  # flextron: probability that one of them is the smallest there is
    distil: float = 0.0  # flextron, routers, task_tuning: weight of KL to the full model or teacher_from
    teacher: TeacherKind = "live"  # flextron, KL to: the full model of the step, or a copy of the first one
    elastic_groups: int = 0  # flextron: storage groups of neurons; 0 = the model's own, or 16
    rank_batches: int = 16  # flextron: batches that rank neurons and heads of init_from, unless it is ranked
    budgets: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875, 1.0)  # routers: shares of the full model's cost
    priced: Priced = "parameters"  # routers: what a budget is counted or measured in
    latency_table: str = ""  # routers, latency_ms: file of elastic-lm latency build, of this device
    context: int = 0  # routers, flops or memory_bytes: positions before the token that is decoded
    scheme: Scheme = "end_to_end"  # routers: through the model, or by a surrogate of its loss
    reads: RoutersRead = "budget"  # routers: what they choose by; hidden: by every token's state, too
    router_width: int = 256  # routers: width of their hidden layer
    router_lr: float = 1.0  # routers: their learning rate as a multiple of the model's
    budget_weight: float = 10.0  # routers: weight of the relative distance from the budget
    train_model: bool = False  # routers: the model trains with them
    surrogate_error: float = 0.5  # routers, surrogate: error up to which routers trust it, nats per token
    teacher_from: str = ""  # task_tuning: folder of the model that it learns from; "" = none
    temperature: float = 1.0  # task_tuning: divides both models' logits for KL
    tuned: Tuned = "all"  # task_tuning: every parameter, or the task's head (with its pooler) or exits alone
    z_loss: float = 0.0  # task_tuning: weight of logsumexp^2; 1e-4 makes energies comparable
    seed: int = 0  # of the parameters that are drawn, sampled sub-models and layer dropout
    log_every: int = 10  # steps between metric lines
    eval_every: int = 500  # steps between held-out evaluations; 0 = only at the end
    eval_batches: int = 20  # batches per held-out evaluation; 0 = all there are
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept

    def __post_init__(self) -> None:
        require_choice("train.method", self.method, get_args(MethodName))
        for field in ("param_dtype", "dtype"):
            require_choice(f"train.{field}", getattr(self, field), ("", *DTYPES))
        require_choice("train.schedule", self.schedule, get_args(Schedule))
        require_choice("train.optimizer", self.optimizer, get_args(Optimizer))
        counts = ("steps", "accumulate", "log_every", "save_every", "keep", "loss_chunk")
        counts += ("samples", "rank_batches", "router_width")
        require_each(self, "train.", counts, *AT_LEAST_1)
        require_each(self, "train.", ("lr", "eps"), *POSITIVE)
        require_each(self, "train.", ("b1", "b2"), lambda v: 0 <= v < 1, "must be in [0, 1)")
        zero_allowed = ("clip", "weight_decay", "exit_warmup", "eval_every", "eval_batches", "init_layers")
        require_each(self, "train.", zero_allowed, *NOT_NEGATIVE)
        require_each(self, "train.", ("seed",), *SEED)
        require(
            0 <= self.warmup < self.steps, "train.warmup", self.warmup, f"must be below steps={self.steps}"
        )
        require(0 <= self.min_lr <= 1, "train.min_lr", self.min_lr, "is a share of lr, in [0, 1]")
        fix = "is a share of steps, in [0, 1]"
        require(0 <= self.decay_share <= 1, "train.decay_share", self.decay_share, fix)
        weights = self.exit_weights
        require(
            all(0 <= w < math.inf for w in weights), "train.exit_weights", weights, "must not be negative"
        )
        require(
            not self.init_layers or bool(self.init_from),
            "train.init_layers",
            self.init_layers,
            "keeps layers of a checkpoint: name it in train.init_from",
        )
        self._check_method()

    def _check_method(self) -> None:
        """Options of single methods, and that no option goes unread."""
        require_choice("train.depth_weights", self.depth_weights, get_args(DepthWeights))
        require_choice("train.curriculum", self.curriculum, get_args(Curriculum))
        require_choice("train.objective", self.objective, get_args(Objective))
        require_choice("train.draw", self.draw, get_args(Draw))
        require_choice("train.teacher", self.teacher, get_args(TeacherKind))
        require_choice("train.tuned", self.tuned, get_args(Tuned))
        distinct = len(set(self.menu_dropped)) == len(self.menu_dropped)
        require(distinct, "train.menu_dropped", self.menu_dropped, "names a layer twice; name each once")
        for field in ("menu_mlp", "menu_heads", "menu_groups", "budgets"):
            require_shares(f"train.{field}", getattr(self, field))
        require_choice("train.scheme", self.scheme, get_args(Scheme))
        require_choice("train.reads", self.reads, get_args(RoutersRead))
        require_choice("train.priced", self.priced, get_args(Priced))
        fix = "name the file that elastic-lm latency build wrote on this device"
        named = self.priced != "latency_ms" or bool(self.latency_table)
        require(named, "train.latency_table", self.latency_table, fix)
        routed, fix = self.method == "routers", "routers choose for an elastic model: name its folder"
        require(not routed or bool(self.init_from), "train.init_from", self.init_from, fix)
        fix = "must be distinct layers, counted from 1, in increasing order"
        increasing = list(self.depths) == sorted(set(self.depths)) and all(d >= 1 for d in self.depths)
        require(increasing, "train.depths", self.depths, fix)
        counts = ("curriculum_period", "dropout_ramp", "top_k", "cached_batches", "elastic_groups")
        require_each(self, "train.", counts, *NOT_NEGATIVE)
        positive = ("depth_scale", "router_lr", "surrogate_error", "temperature")
        require_each(self, "train.", positive, *POSITIVE)
        require_each(self, "train.", ("budget_weight", "context", "z_loss"), *NOT_NEGATIVE)
        shares = ("layer_dropout", "imitation", "smallest_share", "distil")
        require_each(self, "train.", shares, lambda v: 0 <= v <= 1, "must be in [0, 1]")
        require(
            self.curriculum != "rotational" or self.curriculum_period >= 1,
            "train.curriculum_period",
            self.curriculum_period,
            "rotational trains one in so many sub-models a step: must be at least 1",
        )
        for fields, by, values in READ_WITH:
            if (value := getattr(self, by)) not in values:
                only = f"only with {' or '.join(values)}"
                fix = f"not read with train.{by}={value!r}, {only}; change that, or set"
                require_defaults(self, "train.", fields, fix)
        ramp, fix = self.dropout_ramp, "not read with train.layer_dropout=0.0; raise that, or set 0"
        require(not ramp or self.layer_dropout > 0, "train.dropout_ramp", ramp, fix)
        fix = "not read with train.distil=0.0; raise that, or set 'live'"
        require(self.teacher == "live" or self.distil > 0, "train.teacher", self.teacher, fix)
        if self.method == "task_tuning":
            together = (self.distil > 0) == bool(self.teacher_from)
            fix = f"goes with train.teacher_from={self.teacher_from!r}: give both, or neither"
            require(together, "train.distil", self.distil, fix)
        if not self.init_from:
            fix = "not read with train.init_from='', which is not ranked; name a model, or set"
            require_defaults(self, "train.", ("rank_batches",), fix)


WITHOUT_EXITS = (
    "pretraining",
    "sorted_finetuning",
    "flextron",
    "routers",
)  # methods that train no exit heads


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything `elastic-lm train` needs; `configs/*.py` mirror it key by key."""

    model: ModelConfig | None = None  # architecture; None = that of train.init_from
    exits: tuple[ExitConfig, ...] = ()  # exits attached before training
    data: DataConfig = dataclasses.field(default=DataConfig())
    train: TrainConfig = dataclasses.field(default=TrainConfig())
    mesh: MeshConfig = dataclasses.field(default=MeshConfig())

    def __post_init__(self) -> None:
        require(
            self.model is not None or bool(self.train.init_from),
            "model",
            self.model,
            "describe a model, or name a checkpoint in train.init_from",
        )
        drawn = self.model.exits if self.model and not self.train.init_from else ()
        where = "exits" if self.exits else "model.exits"
        require(
            not (self.exits or drawn) or self.train.method not in WITHOUT_EXITS,
            "train.method",
            self.train.method,
            f"trains no exits: choose ee_tuning, self_supervised_exits or joint, or leave {where} out",
        )
        for e in (*drawn, *self.exits):
            require(
                not e.gate or self.train.method == "self_supervised_exits",
                f"{e.name}.gate",
                e.gate,
                f"train.method={self.train.method!r} trains no gates: choose self_supervised_exits, or set 0",
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

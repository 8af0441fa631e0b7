"""Model, exit and training descriptions: frozen, hashable, validated dataclasses.

Every jitted function of the package treats these objects as *static*: they decide shapes and
program structure. Whatever a user turns while a program runs (thresholds, temperatures, seeds,
prompts) is traced and lives elsewhere.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, get_args

from elastic_lm.plain import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    require,
    require_choice,
    require_defaults,
    require_each,
)
from elastic_lm.rope_config import RopeConfig

NormKind = Literal["rmsnorm", "layernorm"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Position = Literal["rope", "learned"]
ExitKind = Literal["embedding", "norm", "mlp", "block"]
ExitInit = Literal["copy", "random"]
DataSource = Literal["stdlib", "text", "jsonl", "instruction"]
Packing = Literal["concat", "first_fit"]
MethodName = Literal["pretraining", "ee_tuning", "joint", "sorted_finetuning", "self_supervised_exits"]
DepthWeights = Literal["uniform", "linear", "sum", "sqrt", "inverse", "inverse_sqrt", "layerskip"]
Curriculum = Literal["all", "sampled", "rotational", "gradual"]
Objective = Literal["kl", "argmax", "penalised"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
Optimizer = Literal["adamw", "muon"]

WITHOUT_EXITS = ("pretraining", "sorted_finetuning")  # methods that train no exit heads
DTYPES = ("float32", "bfloat16", "float16")

SORTED = ("depths", "depth_weights", "depth_scale", "curriculum", "curriculum_period", "layer_dropout")
SELF_SUPERVISED = ("objective", "top_k", "imitation", "cached_batches", "balance_gates")
# Options of TrainConfig, the field that decides whether they are read, and its values that have them read.
READ_WITH = (
    (("exit_weights", "exit_warmup", "confidence_weighted"), "method", ("ee_tuning", "joint")),
    ((*SORTED, "dropout_ramp"), "method", ("sorted_finetuning",)),
    (SELF_SUPERVISED, "method", ("self_supervised_exits",)),
    (("remat",), "method", ("pretraining", "ee_tuning", "joint", "sorted_finetuning")),
    (("curriculum_period",), "curriculum", ("rotational", "gradual")),
    (("top_k",), "objective", ("kl",)),
    (("imitation",), "objective", ("penalised",)),
)


@dataclasses.dataclass(frozen=True)
class ExitConfig:
    """One early exit: a head that predicts the next token after layer `layer` (EE-Tuning, sec. 2)."""

    layer: int  # the exit reads the output of this many layers, 1 .. n_layers
    kind: ExitKind = "mlp"  # what stands between the hidden state and the vocabulary head
    tied: bool = False  # True: reads the model's own vocabulary head instead of owning a copy
    init: ExitInit = "copy"  # copy modules of the pretrained model, or draw at random
    temperature: float = 1.0  # logits are divided by this
    gate: int = 0  # hidden width of a classifier that decides whether the head is read; 0 = none

    def __post_init__(self) -> None:
        require(self.layer >= 1, "exit.layer", self.layer, "layers are counted from 1")
        require_choice("exit.kind", self.kind, get_args(ExitKind))
        require_choice("exit.init", self.init, get_args(ExitInit))
        require(self.gate >= 0, "exit.gate", self.gate, "must be a width, or 0 for none")
        require(self.temperature > 0, "exit.temperature", self.temperature, "must be positive")

    @property
    def name(self) -> str:
        """Key of this exit's parameters."""
        return f"exit_{self.layer}"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with the knobs that the supported families need."""

    vocab_size: int  # rows of the embedding and of the vocabulary head
    d_model: int  # width of the residual stream
    n_layers: int  # transformer layers
    n_heads: int  # query heads
    d_mlp: int  # hidden width of the MLP
    n_kv_heads: int = 0  # key/value heads; 0 = n_heads (no grouping)
    head_dim: int = 0  # width of one head; 0 = d_model // n_heads
    max_len: int = 2048  # longest supported sequence, in tokens
    norm: NormKind = "rmsnorm"  # kind of every normalisation
    norm_eps: float = 1e-5  # added to the variance
    norm_offset: float = 0.0  # added to the stored scale (1 for Gemma and Nemotron)
    sandwich_norm: bool = False  # also normalise what attention and MLP return (Gemma 2)
    parallel_residual: bool = False  # attention and MLP both read the layer's input (NeoX)
    activation: Activation = "silu"  # MLP non-linearity
    gated: bool = True  # MLP is act(gate) * up instead of act(up)
    qkv_bias: bool = False  # biases on query, key and value projections
    out_bias: bool = False  # bias on attention's output projection
    mlp_bias: bool = False  # biases on the MLP's projections
    qk_norm: bool = False  # RMS-normalise each query and key head (Qwen 3)
    position: Position = "rope"  # rotary, or a learned table added to the embedding
    rope: RopeConfig = dataclasses.field(default=RopeConfig())  # used when position == "rope"
    layer_mlp: tuple[int, ...] = ()  # d_mlp of every layer, the largest is d_mlp; () = all the same
    layer_heads: tuple[int, ...] = ()  # n_heads of every layer, likewise
    layer_kv_heads: tuple[int, ...] = ()  # n_kv_heads of every layer, likewise
    elastic_groups: int = 0  # storage groups that ranked neurons are dealt out to; 0 = plain order
    norm_width: int = 0  # channels a norm averages over where the others are masked to 0; 0 = d_model
    windows: tuple[int, ...] = ()  # sliding window per layer in tokens, 0 = full; () = all full
    attn_scale: float = 0.0  # multiplies q.k; 0 = head_dim ** -0.5
    attn_softcap: float = 0.0  # attention logits pass c * tanh(x / c); 0 = off
    final_softcap: float = 0.0  # the same for vocabulary logits; 0 = off
    embed_scale: float = 1.0  # multiplies token embeddings (Gemma: sqrt(d_model))
    tied: bool = False  # the vocabulary head is the embedding table
    exits: tuple[ExitConfig, ...] = ()  # early exits in increasing depth
    dtype: str = "float32"  # dtype of activations
    param_dtype: str = "float32"  # dtype of stored parameters
    family: str = "llama"  # Hugging Face model_type this model is exported as
    bos_id: int | None = None  # beginning-of-text token of the checkpoint; tokenizers decide about its use
    eos_ids: tuple[int, ...] = ()  # tokens that end a text

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "d_mlp", "max_len")
        require_each(self, "", sizes, *AT_LEAST_1)
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        if not self.head_dim:
            require(
                self.d_model % self.n_heads == 0,
                "d_model",
                self.d_model,
                f"is not a multiple of n_heads={self.n_heads}; set head_dim explicitly",
            )
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        require_each(self, "", ("n_kv_heads", "head_dim"), *AT_LEAST_1)
        self._check_layer_sizes()
        require_choice("norm", self.norm, get_args(NormKind))
        require_choice("activation", self.activation, get_args(Activation))
        require_choice("position", self.position, get_args(Position))
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("param_dtype", self.param_dtype, DTYPES)
        require(
            len(self.windows) in (0, self.n_layers),
            "windows",
            self.windows,
            f"needs one entry per layer ({self.n_layers}) or none",
        )
        require_each(self, "", ("norm_eps", "attn_softcap", "final_softcap"), *NOT_NEGATIVE)
        require(all(w >= 0 for w in self.windows), "windows", self.windows, "must be tokens, or 0 for full")
        layers = [e.layer for e in self.exits]
        distinct = layers == sorted(set(layers))
        require(distinct, "exits", tuple(layers), "must be distinct layers in increasing order")
        require(
            not layers or layers[-1] <= self.n_layers,
            "exits",
            tuple(layers),
            f"the model has only n_layers={self.n_layers}",
        )

    def _check_layer_sizes(self) -> None:
        for each, scalar in (
            ("layer_mlp", "d_mlp"),
            ("layer_heads", "n_heads"),
            ("layer_kv_heads", "n_kv_heads"),
        ):
            sizes, largest = getattr(self, each), getattr(self, scalar)
            fix = f"needs {self.n_layers} sizes of at least 1, one per layer, the largest {scalar}={largest}"
            fits = len(sizes) == self.n_layers and min(sizes) >= 1 and max(sizes) == largest
            require(not sizes or fits, each, sizes, fix)
            if len(set(sizes)) == 1:
                object.__setattr__(self, each, ())
        groups, width = self.elastic_groups, self.norm_width
        require(0 <= width <= self.d_model, "norm_width", width, f"must be at most d_model={self.d_model}")
        require(groups >= 0, "elastic_groups", groups, "must be a number of groups, or 0 for plain order")
        for i, (mlp, heads, kv) in enumerate(map(self.sizes, range(self.n_layers))):
            where = f" of layer {i}" if self.heterogeneous else ""
            require(heads % kv == 0, "n_kv_heads", kv, f"must divide n_heads={heads}{where}")
            fix = f"must divide d_mlp={mlp}{where}; choose {math.gcd(mlp, groups)}"
            require(not groups or mlp % groups == 0, "elastic_groups", groups, fix)

    @property
    def heterogeneous(self) -> bool:
        """Whether layers differ in size."""
        return bool(self.layer_mlp or self.layer_heads or self.layer_kv_heads)

    def sizes(self, layer: int) -> tuple[int, int, int]:
        """(MLP neurons, query heads, key/value heads) of `layer` (counted from 0)."""
        each = (
            (self.layer_mlp, self.d_mlp),
            (self.layer_heads, self.n_heads),
            (self.layer_kv_heads, self.n_kv_heads),
        )
        mlp, heads, kv_heads = (sizes[layer] if sizes else size for sizes, size in each)
        return mlp, heads, kv_heads

    def layer(self, layer: int) -> "ModelConfig":
        """The model with every layer of the sizes of `layer` (counted from 0)."""
        if not self.heterogeneous:
            return self
        return self.with_layers(range(self.n_layers), [self.sizes(layer)] * self.n_layers, self.exits)

    def with_layers(
        self,
        layers: Sequence[int],
        sizes: Sequence[tuple[int, int, int]] | None = None,
        exits: tuple[ExitConfig, ...] = (),
    ) -> "ModelConfig":
        """The model made of these layers (counted from 0), of these `sizes` (None = as they are)."""
        mlp, heads, kv_heads = zip(*(sizes or map(self.sizes, layers)), strict=True)
        return dataclasses.replace(
            self,
            n_layers=len(layers),
            windows=tuple(map(self.window, layers)) if self.windows else (),
            exits=exits,
            **{"d_mlp": max(mlp), "n_heads": max(heads), "n_kv_heads": max(kv_heads)},
            **{"layer_mlp": mlp, "layer_heads": heads, "layer_kv_heads": kv_heads},
        )

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that are rotated."""
        return int(self.head_dim * self.rope.fraction)

    @property
    def query_scale(self) -> float:
        """Factor applied to query-key products."""
        return self.attn_scale or 1.0 / math.sqrt(self.head_dim)

    def window(self, layer: int) -> int:
        """Sliding window of `layer` (counted from 0) in tokens; 0 = full attention."""
        return self.windows[layer] if self.windows else 0

    def with_exits(self, exits: tuple[ExitConfig, ...]) -> "ModelConfig":
        """The same model with these exits."""
        return dataclasses.replace(self, exits=exits)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    source: DataSource = "stdlib"  # the interpreter's own library, text files, or JSON lines
    paths: tuple[str, ...] = ()  # training files or folders; unused by stdlib
    eval_paths: tuple[str, ...] = ()  # held-out files or folders; unused by stdlib (its test split)
    text_field: str = "text"  # jsonl: key of the text
    prompt_field: str = "prompt"  # instruction: key of what is read but not learned
    response_field: str = "response"  # instruction: key of what is learned
    tokenizer: str = ""  # folder or tokenizer.json; "" = that of train.init_from, or train a BPE
    seq_len: int = 256  # tokens per row
    batch_size: int = 16  # rows per optimizer step, over all devices
    packing: Packing = "concat"  # cut documents at row ends, or keep each whole and pad (truncating)
    span: int = 2048  # text is shuffled in pieces of about this many bytes, cut at line ends
    seed: int = 0  # of the shuffle

    def __post_init__(self) -> None:
        require_choice("data.source", self.source, get_args(DataSource))
        require_choice("data.packing", self.packing, get_args(Packing))
        require_each(self, "data.", ("seq_len", "batch_size", "span"), *AT_LEAST_1)
        require_each(self, "data.", ("seed",), *SEED)
        require(
            self.source == "stdlib" or bool(self.paths),
            "data.paths",
            self.paths,
            f"source={self.source!r} reads files: name at least one",
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
    exit_weights: tuple[float, ...] = ()  # ee_tuning, joint: loss weight per exit; () = all 1
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
        """Options of sorted_finetuning and self_supervised_exits, and that no option goes unread."""
        require_choice("train.depth_weights", self.depth_weights, get_args(DepthWeights))
        require_choice("train.curriculum", self.curriculum, get_args(Curriculum))
        require_choice("train.objective", self.objective, get_args(Objective))
        fix = "must be distinct layers, counted from 1, in increasing order"
        increasing = list(self.depths) == sorted(set(self.depths)) and all(d >= 1 for d in self.depths)
        require(increasing, "train.depths", self.depths, fix)
        require_each(
            self, "train.", ("curriculum_period", "dropout_ramp", "top_k", "cached_batches"), *NOT_NEGATIVE
        )
        require_each(self, "train.", ("depth_scale",), *POSITIVE)
        shares = ("layer_dropout", "imitation")
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


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1 on one axis = all that are left."""

    data: int = -1  # rows of a batch
    fsdp: int = 1  # rows of a batch and slices of every parameter
    tensor: int = 1  # heads, MLP width and vocabulary


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything `elastic-lm train` needs; `configs/*.py` mirror it key by key."""

    model: ModelConfig | None = None  # architecture; None = that of train.init_from
    exits: tuple[ExitConfig, ...] = ()  # exits attached before training
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        require(
            self.model is not None or bool(self.train.init_from),
            "model",
            self.model,
            "describe a model, or name a checkpoint in train.init_from",
        )
        require(
            not self.exits or self.train.method not in WITHOUT_EXITS,
            "train.method",
            self.train.method,
            "trains no exits: choose ee_tuning, self_supervised_exits or joint, or leave exits out",
        )
        drawn = self.model.exits if self.model and not self.train.init_from else ()
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

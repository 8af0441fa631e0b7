"""Model, exit and training descriptions: frozen, hashable, validated dataclasses.

Every jitted function of the package treats these objects as *static*: they decide shapes and
program structure. Whatever a user turns while a program runs (thresholds, temperatures, seeds,
prompts) is traced and lives elsewhere.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

NormKind = Literal["rmsnorm", "layernorm"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Position = Literal["rope", "learned"]
RopeScaling = Literal["none", "linear", "dynamic", "llama3", "yarn"]
ExitKind = Literal["embedding", "norm", "mlp", "block"]
ExitInit = Literal["copy", "random"]

DTYPES = ("float32", "bfloat16", "float16")


def _require(ok: bool, field: str, value: object, fix: str) -> None:
    if not ok:
        raise ValueError(f"{field}={value!r}: {fix}")


def _require_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    _require(value in choices, field, value, f"must be one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and its long-context variants."""

    theta: float = 10000.0  # base of the geometric sequence of wavelengths
    fraction: float = 1.0  # share of each head that is rotated (NeoX 0.25, Nemotron 0.5)
    scaling: RopeScaling = "none"  # how frequencies are stretched for longer contexts
    factor: float = 1.0  # stretch factor of the scaling
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_max_len / this are stretched
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_max_len / this are kept
    original_max_len: int = 0  # context the model was pretrained for; 0 = ModelConfig.max_len
    beta_fast: float = 32.0  # yarn: rotations above which a frequency is kept
    beta_slow: float = 1.0  # yarn: rotations below which a frequency is stretched
    attention_factor: float = 0.0  # yarn: multiplier of cos and sin; 0 = 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: round the ramp's borders to whole dimensions

    def __post_init__(self) -> None:
        _require(self.theta > 0, "rope.theta", self.theta, "must be positive")
        _require(0 < self.fraction <= 1, "rope.fraction", self.fraction, "must be in (0, 1]")
        _require_choice("rope.scaling", self.scaling, get_args(RopeScaling))
        _require(self.factor >= 1, "rope.factor", self.factor, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class ExitConfig:
    """One early exit: a head that predicts the next token after layer `layer` (EE-Tuning, sec. 2)."""

    layer: int  # the exit reads the output of this many layers, 1 .. n_layers
    kind: ExitKind = "mlp"  # what stands between the hidden state and the vocabulary head
    tied: bool = False  # True: reads the model's own vocabulary head instead of owning a copy
    init: ExitInit = "copy"  # copy modules of the pretrained model, or draw at random
    temperature: float = 1.0  # logits are divided by this

    def __post_init__(self) -> None:
        _require(self.layer >= 1, "exit.layer", self.layer, "layers are counted from 1")
        _require_choice("exit.kind", self.kind, get_args(ExitKind))
        _require_choice("exit.init", self.init, get_args(ExitInit))
        _require(self.temperature > 0, "exit.temperature", self.temperature, "must be positive")

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
    rope: RopeConfig = RopeConfig()  # used when position == "rope"
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
    bos_id: int | None = None  # token put before every prompt, if any
    eos_ids: tuple[int, ...] = ()  # tokens that end a text

    def __post_init__(self) -> None:
        for field in ("vocab_size", "d_model", "n_layers", "n_heads", "d_mlp", "max_len"):
            _require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1")
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        if not self.head_dim:
            _require(
                self.d_model % self.n_heads == 0,
                "d_model",
                self.d_model,
                f"is not a multiple of n_heads={self.n_heads}; set head_dim explicitly",
            )
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        _require(
            self.n_heads % self.n_kv_heads == 0,
            "n_kv_heads",
            self.n_kv_heads,
            f"must divide n_heads={self.n_heads}",
        )
        _require_choice("norm", self.norm, get_args(NormKind))
        _require_choice("activation", self.activation, get_args(Activation))
        _require_choice("position", self.position, get_args(Position))
        _require_choice("dtype", self.dtype, DTYPES)
        _require_choice("param_dtype", self.param_dtype, DTYPES)
        _require(
            len(self.windows) in (0, self.n_layers),
            "windows",
            self.windows,
            f"needs one entry per layer ({self.n_layers}) or none",
        )
        layers = [e.layer for e in self.exits]
        _require(
            layers == sorted(set(layers)),
            "exits",
            tuple(layers),
            "must be distinct layers in increasing order",
        )
        _require(
            not layers or layers[-1] <= self.n_layers,
            "exits",
            tuple(layers),
            f"the model has only n_layers={self.n_layers}",
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


def to_dict(config: Any) -> dict[str, Any]:
    """Turns any config dataclass into plain JSON-compatible dicts and lists."""
    return dataclasses.asdict(config)


def from_dict(cls: Any, values: Mapping[str, Any], where: str = "") -> Any:
    """Builds config dataclass `cls` from nested dicts, refusing unknown keys.

    Args:
      cls: a config dataclass of this module (nested dataclass fields are built too).
      values: mapping from field names to values; missing fields take their defaults.
      where: dotted prefix used in messages.

    Returns:
      An instance of `cls`.

    Raises:
      ValueError: a key is unknown (with the closest known one), or a value is refused by `cls`.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {where}{key}={value!r}: {hint}")
        kwargs[key] = _coerce(hints[key], value, f"{where}{key}")
    return cls(**kwargs)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Turns JSON's lists and dicts into the tuples and dataclasses that `hint` asks for."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(hint, value, where + ".")
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    return value

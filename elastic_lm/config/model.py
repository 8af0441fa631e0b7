"""What a decoder and its exits are: frozen, hashable, validated dataclasses.

Every jitted function of the package treats these objects as *static*: they decide shapes and
program structure. Whatever a user turns while a program runs (thresholds, temperatures, seeds,
prompts) is traced and lives elsewhere.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, get_args

from elastic_lm.config.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    is_whole,
    require,
    require_choice,
    require_each,
    require_ids,
    require_layers,
    require_types,
)
from elastic_lm.config.rope import RopeConfig

NormKind = Literal["rmsnorm", "layernorm"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Position = Literal["rope", "learned", "alibi"]
ExitKind = Literal["embedding", "norm", "linear", "mlp", "block"]
ExitInit = Literal["copy", "random", "fit"]


@dataclasses.dataclass(frozen=True)
class ExitConfig:
    """One early exit: a head that predicts the next token after layer `layer` (EE-Tuning, sec. 2).

    Example:
      ```python
      import elastic_lm as el

      exits = (el.ExitConfig(2, kind="norm", tied=True), el.ExitConfig(3, gate=8))
      assert [e.name for e in exits] == ["exit_2", "exit_3"]
      ```
    """

    layer: int  # the exit reads the output of this many layers, 1 .. n_layers
    kind: ExitKind = "mlp"  # what stands between the hidden state and the vocabulary head
    tied: bool = False  # True: reads the model's own vocabulary head instead of owning a copy
    init: ExitInit = "copy"  # copy modules of the pretrained model, draw at random, or copy and fit
    temperature: float = 1.0  # logits are divided by this
    gate: int = 0  # hidden width of a classifier that decides whether the head is read; 0 = none
    hidden: int = 0  # linear: hidden width of a gated MLP beside the affine map; 0 = none

    def __post_init__(self) -> None:
        require_types(self, "exit.")
        require(self.layer >= 1, "exit.layer", self.layer, "layers are counted from 1")
        require_choice("exit.kind", self.kind, get_args(ExitKind))
        require_choice("exit.init", self.init, get_args(ExitInit))
        require(is_whole(self.gate), "exit.gate", self.gate, "must be a width, or 0 for none")
        require(is_whole(self.hidden), "exit.hidden", self.hidden, "must be a width, or 0 for none")
        require(
            self.kind == "linear" or not self.hidden,
            "exit.hidden",
            self.hidden,
            f"not read with exit.kind={self.kind!r}; set 0, or kind='linear'",
        )
        require(
            self.kind != "embedding" or self.init != "fit",
            "exit.init",
            self.init,
            "exit.kind='embedding' has nothing to fit; choose linear, or norm",
        )
        require(self.temperature > 0, "exit.temperature", self.temperature, "must be positive")

    @property
    def name(self) -> str:
        """Key of this exit's parameters."""
        return f"exit_{self.layer}"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with the knobs that the supported families need.

    Example:
      ```python
      import elastic_lm as el

      config = el.ModelConfig(vocab_size=512, d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, d_mlp=128)
      assert (config.head_dim, config.group_size) == (16, 2)
      ```
    """

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
    norm_bias: bool = True  # layernorm: biases beside the scales (Cohere has none)
    pre_norm: bool = True  # normalise what attention and MLP read
    sandwich_norm: bool = False  # also normalise what attention and MLP return (Gemma 2; OLMo 2: only that)
    parallel_residual: bool = False  # attention and MLP both read the layer's input (NeoX)
    shared_norm: bool = False  # parallel_residual: attention and MLP read the same norm of it (GPT-J)
    activation: Activation = "silu"  # MLP non-linearity
    gated: bool = True  # MLP is act(gate) * up instead of act(up)
    qkv_bias: bool = False  # biases on query, key and value projections
    out_bias: bool = False  # bias on attention's output projection
    mlp_bias: bool = False  # biases on the MLP's projections
    head_bias: bool = False  # biases on the vocabulary heads, which own their kernels (GPT-J, Phi)
    qk_norm: bool = False  # RMS-normalise each query and key head (Qwen 3)
    qk_norm_whole: bool = False  # qk_norm: all heads of a token at once, instead of each (OLMo 2)
    position: Position = "rope"  # rotary, a learned table added to the embedding, or a bias of attention
    position_offset: int = 0  # rows of the learned table before that of position 0 (OPT: 2)
    alibi_scale: float = 1.0  # position == "alibi": multiplies the slopes (Falcon: head_dim ** -0.5)
    alibi_rounded: bool = False  # position == "alibi": slopes and penalties are bfloat16 numbers (Falcon)
    rope: RopeConfig = dataclasses.field(default=RopeConfig())  # used when position == "rope"
    local_rope: RopeConfig | None = None  # of layers with a sliding window (Gemma 3); None = `rope`
    rotated: tuple[bool, ...] = ()  # whether each layer rotates (SmolLM3: not all); () = all do
    layer_mlp: tuple[int, ...] = ()  # d_mlp of every layer, the largest is d_mlp; () = all the same
    layer_heads: tuple[int, ...] = ()  # n_heads of every layer, likewise
    layer_kv_heads: tuple[int, ...] = ()  # n_kv_heads of every layer, likewise
    elastic_groups: int = 0  # storage groups that ranked neurons are dealt out to; 0 = plain order
    norm_width: int = 0  # channels a norm averages over where the others are masked to 0; 0 = d_model
    windows: tuple[int, ...] = ()  # sliding window per layer in tokens, 0 = full; () = all full
    attn_scale: float = 0.0  # multiplies q.k; 0 = head_dim ** -0.5
    query_growth: float = 0.0  # queries are multiplied by 1 + this * ln(1 + p // rope.original_max_len)
    attn_softcap: float = 0.0  # attention logits pass c * tanh(x / c); 0 = off
    final_softcap: float = 0.0  # the same for vocabulary logits; 0 = off
    embed_scale: float = 1.0  # multiplies token embeddings (Gemma: sqrt(d_model))
    residual_scale: float = 1.0  # multiplies what attention and MLP add to the residual stream (Granite)
    logit_scale: float = 1.0  # multiplies vocabulary logits, before a softcap (Granite, Cohere)
    embed_norm: bool = False  # normalise the embeddings before the first layer (BLOOM)
    tied: bool = False  # the vocabulary head is the embedding table
    exits: tuple[ExitConfig, ...] = ()  # early exits in increasing depth
    dtype: str = "float32"  # dtype of activations
    param_dtype: str = "float32"  # dtype of stored parameters
    family: str = "llama"  # Hugging Face model_type this model is exported as
    bos_id: int | None = None  # beginning-of-text token of the checkpoint; tokenizers decide about its use
    eos_ids: tuple[int, ...] = ()  # tokens that end a text

    def __post_init__(self) -> None:
        require_types(self)
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "d_mlp", "max_len")
        require_each(self, "", sizes, *AT_LEAST_1)
        require_layers("n_layers", self.n_layers)
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
        numbers = ("norm_eps", "query_growth", "attn_softcap", "final_softcap")
        require_each(self, "", numbers, *NOT_NEGATIVE)
        self._check_rotation()
        self._check_norms_and_scales()
        self._check_partners()
        tokens = all(is_whole(w) for w in self.windows)
        require(tokens, "windows", self.windows, "must be tokens, or 0 for full")
        require_ids("eos_ids", self.eos_ids, low=-1)  # old configs write -1 for none
        require(self.bos_id is None or is_whole(self.bos_id), "bos_id", self.bos_id, "must be a token id")
        layers = [e.layer for e in self.exits]
        distinct = layers == sorted(set(layers))
        require(distinct, "exits", tuple(layers), "must be distinct layers in increasing order")
        require(
            not layers or layers[-1] <= self.n_layers,
            "exits",
            tuple(layers),
            f"the model has only n_layers={self.n_layers}",
        )

    def _check_rotation(self) -> None:
        if self.local_rope == self.rope or not any(self.windows):
            object.__setattr__(self, "local_rope", None)
        if all(self.rotated):
            object.__setattr__(self, "rotated", ())
        require(
            len(self.rotated) in (0, self.n_layers),
            "rotated",
            self.rotated,
            f"needs one entry per layer ({self.n_layers}) or none",
        )
        for field in ("local_rope", "rotated"):
            value = getattr(self, field)
            fix = f"is not read with position={self.position!r}; leave it out"
            require(not value or self.position == "rope", field, value, fix)
        local = self.local_rope
        if local is not None:
            alike = (local.fraction, local.interleaved) == (self.rope.fraction, self.rope.interleaved)
            require(alike, "local_rope", local, "must have the fraction and the pairs of `rope`")
        for field, rope in (("rope", self.rope), ("local_rope", local)):
            if rope is not None and self.position == "rope":
                self._check_rope(field, rope)

        reads = bool(self.rope.original_max_len) and self.position == "rope"
        fix = "needs position='rope' and rope.original_max_len"
        require(reads or not self.query_growth, "query_growth", self.query_growth, fix)

    def _check_rope(self, field: str, rope: RopeConfig) -> None:
        beyond = rope.scaling == "dynamic" and 0 < rope.original_max_len < self.max_len
        require(
            not beyond,
            "max_len",
            self.max_len,
            f"must be at most {field}.original_max_len={rope.original_max_len}, up to which "
            f"{field}.scaling='dynamic' is computed",
        )
        pairs, given = self.rotary_dim // 2, len(rope.short_factors)
        require(
            rope.scaling != "longrope" or given == pairs,
            f"{field}.short_factors",
            rope.short_factors,
            f"must be {pairs} numbers, one per rotated pair of a head",
        )

    def _check_norms_and_scales(self) -> None:
        require_each(self, "", ("embed_scale", "residual_scale", "logit_scale"), *POSITIVE)
        require(
            self.pre_norm or (self.sandwich_norm and not self.parallel_residual),
            "pre_norm",
            self.pre_norm,
            "needs norms after attention and MLP: set sandwich_norm=True, parallel_residual=False",
        )
        require(self.qk_norm or not self.qk_norm_whole, "qk_norm_whole", True, "needs qk_norm=True")
        require(
            not (self.qk_norm_whole and (self.layer_heads or self.layer_kv_heads)),
            "qk_norm_whole",
            self.qk_norm_whole,
            "normalises all heads of a layer at once: layers must have the same heads",
        )

    def _check_partners(self) -> None:
        """Refuses settings that have no meaning without, or beside, another one."""
        require(
            not self.shared_norm or self.parallel_residual,
            "shared_norm",
            self.shared_norm,
            "is of parallel branches; set parallel_residual=True",
        )
        require(
            not self.head_bias or not self.tied,
            "tied",
            self.tied,
            "a vocabulary head with a bias (head_bias=True) owns its kernel; set tied=False",
        )
        whole = is_whole(self.position_offset)
        require(whole, "position_offset", self.position_offset, "must be a number of rows, or 0 for none")
        require_each(self, "", ("alibi_scale",), *POSITIVE)
        for field, of in (
            ("position_offset", "learned"),
            ("alibi_scale", "alibi"),
            ("alibi_rounded", "alibi"),
        ):
            read = self.position == of or getattr(self, field) == getattr(type(self), field)
            require(read, field, getattr(self, field), f"is not read with position={self.position!r}")
        require(
            self.position != "alibi" or not (self.layer_heads or self.layer_kv_heads),
            "layer_heads",
            self.layer_heads,
            "layers of a model with position='alibi' have the same heads, each with its own slope",
        )

    def _check_layer_sizes(self) -> None:
        for each, scalar in (
            ("layer_mlp", "d_mlp"),
            ("layer_heads", "n_heads"),
            ("layer_kv_heads", "n_kv_heads"),
        ):
            sizes, largest = getattr(self, each), getattr(self, scalar)
            fits = len(sizes) == self.n_layers and min(sizes) >= 1 and max(sizes) == largest
            require(
                not sizes or fits,
                each,
                sizes,
                f"needs {self.n_layers} sizes of at least 1, one per layer, the largest {scalar}={largest}",
            )
            if len(set(sizes)) == 1:
                object.__setattr__(self, each, ())
        groups, width = self.elastic_groups, self.norm_width
        require(0 <= width <= self.d_model, "norm_width", width, f"must be at most d_model={self.d_model}")
        require(groups >= 0, "elastic_groups", groups, "must be a number of groups, or 0 for plain order")
        for i, (mlp, heads, kv) in enumerate(map(self.sizes, range(self.n_layers))):
            where = f" of layer {i}" if self.heterogeneous else ""
            require(heads % kv == 0, "n_kv_heads", kv, f"must divide n_heads={heads}{where}")
            require(
                not groups or mlp % groups == 0,
                "elastic_groups",
                groups,
                f"must divide d_mlp={mlp}{where}; choose {math.gcd(mlp, groups)}",
            )

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
        """The model with every layer of the sizes and the rotation of `layer` (counted from 0)."""
        same = self
        if self.heterogeneous:
            same = self.with_layers(range(self.n_layers), [self.sizes(layer)] * self.n_layers, self.exits)
        if self.layers_rotate_alike:
            return same
        rope = self.rope_of(layer)
        rotated = (rope is not None,) * self.n_layers
        return dataclasses.replace(same, rope=rope or self.rope, local_rope=None, rotated=rotated)

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
            rotated=tuple(self.rotated[i] for i in layers) if self.rotated else (),
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
    def rotates(self) -> bool:
        """Whether any layer rotates its queries and keys."""
        return self.position == "rope" and (not self.rotated or any(self.rotated))

    @property
    def layers_rotate_alike(self) -> bool:
        """Whether all layers rotate by `rope`."""
        return self.local_rope is None and not self.rotated

    def rope_of(self, layer: int) -> RopeConfig | None:
        """How `layer` (counted from 0) rotates; None = not at all."""
        if self.position != "rope" or (self.rotated and not self.rotated[layer]):
            return None
        return self.local_rope if self.local_rope is not None and self.window(layer) else self.rope

    @property
    def recomputed_from(self) -> int:
        """Length in tokens above which a text's cached keys and values are others (longrope); 0 = none."""
        ropes = [rope for rope in (self.rope, self.local_rope) if rope and rope.scaling == "longrope"]
        return ropes[0].original_max_len if ropes and self.position == "rope" else 0

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


DTYPES = ("float32", "bfloat16", "float16")

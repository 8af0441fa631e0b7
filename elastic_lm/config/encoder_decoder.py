"""Description of an encoder-decoder model: frozen, hashable, validated; static to every jitted function."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from elastic_lm.config.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    require,
    require_choice,
    require_each,
    require_layers,
    require_types,
)
from elastic_lm.config.model import DTYPES, Activation, ModelConfig, NormKind

Places = Literal["relative", "learned", "sinusoidal"]


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Two stacks of layers: T5 (arXiv 1910.10683) as the defaults say, or a relative, or BART or Marian.

    T5's layers have norms in front and no biases, and positions are biases of attention. BART (1910.13461)
    and Marian (1804.00344) add vectors of positions to embeddings, and have norms behind and biases.

    Example:
      ```python
      import elastic_lm as el

      shape = {"vocab_size": 32128, "d_model": 512, "n_layers": 6, "n_heads": 8, "d_mlp": 2048}
      config = el.EncoderDecoderConfig(**shape)  # T5-small
      assert (config.n_decoder_layers, config.head_dim) == (6, 64)
      ```
    """

    vocab_size: int  # rows of the embedding and of the vocabulary head
    d_model: int  # width of the residual streams
    n_layers: int  # transformer layers of the encoder
    n_heads: int  # attention heads
    d_mlp: int  # hidden width of the MLP
    n_decoder_layers: int = 0  # transformer layers of the decoder; 0 = n_layers
    head_dim: int = 0  # width of one head; 0 = d_model // n_heads
    activation: Activation = "relu"  # MLP non-linearity
    gated: bool = False  # MLP is act(gate) * up instead of act(up) (T5 1.1)
    norm: NormKind = "rmsnorm"  # kind of normalisation
    pre_norm: bool = True  # norms stand before attention and MLP, and one after each stack; else behind
    biases: bool = False  # of projections and MLPs
    positions: Places = "relative"  # biases of attention, or vectors added to the embeddings
    max_len: int = 0  # longest source and target, where positions are vectors; 0 = there is no limit
    position_offset: int = 0  # learned: row of the first position (BART: 2)
    embed_norm: bool = False  # what enters a stack is normalised
    scaled_embedding: bool = False  # embeddings are multiplied by d_model ** 0.5
    bias_per_layer: bool = False  # every layer has its own biases of distance (UMT5), not a whole stack
    relative_buckets: int = 32  # distances that have a bias of their own, both directions together
    relative_max_distance: int = 128  # tokens from which on all distances share a bias
    norm_eps: float = 1e-6  # added to the mean square or the variance
    tied: bool = True  # the vocabulary head is the embedding table
    scaled_head: bool = True  # the head reads the final state times d_model ** -0.5 (T5 1.0)
    logits_bias: bool = False  # the logits have a bias, which does not train
    n_labels: int = 0  # classes of a linear head on the encoder's mean state; 0 = no such head
    labels: tuple[str, ...] = ()  # names of these classes; () = they have none
    decoder_start_id: int = 0  # token that stands before every target
    text_start_id: int | None = None  # token put before sources and targets; None = there is none
    forced_bos_id: int | None = None  # the first token that is generated; None = the model chooses
    forced_eos_id: int | None = None  # the last token where a target is cut at its limit; None = likewise
    suppressed_ids: tuple[int, ...] = ()  # tokens that are never generated
    pad_id: int = 0  # token that fills rows up
    eos_ids: tuple[int, ...] = (1,)  # tokens that end a text; the first one is put after sources and targets
    dtype: str = "float32"  # dtype of activations
    param_dtype: str = "float32"  # dtype of stored parameters
    family: str = "t5"  # Hugging Face model_type this model is exported as

    def __post_init__(self) -> None:
        require_types(self)
        object.__setattr__(self, "n_decoder_layers", self.n_decoder_layers or self.n_layers)
        sizes = ("vocab_size", "d_model", "n_layers", "n_decoder_layers", "n_heads", "d_mlp")
        require_each(self, "", sizes, *AT_LEAST_1)
        require_layers("n_layers", self.n_layers)
        require_layers("n_decoder_layers", self.n_decoder_layers)
        if not self.head_dim:
            require(
                self.d_model % self.n_heads == 0,
                "d_model",
                self.d_model,
                f"is not a multiple of n_heads={self.n_heads}; set head_dim explicitly",
            )
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        require_each(self, "", ("head_dim",), *AT_LEAST_1)
        counts = ("norm_eps", "n_labels", "max_len", "position_offset")
        require_each(self, "", counts, *NOT_NEGATIVE)
        require(
            len(self.labels) in (0, self.n_labels),
            "labels",
            self.labels,
            f"needs one name for each of n_labels={self.n_labels}, or none at all",
        )
        require_choice("activation", self.activation, get_args(Activation))
        require_choice("norm", self.norm, get_args(NormKind))
        require_choice("positions", self.positions, get_args(Places))
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("param_dtype", self.param_dtype, DTYPES)
        self._check_positions()
        self._check_ids()

    def _check_positions(self) -> None:
        if self.positions != "relative":
            require(
                self.max_len >= 1, "max_len", self.max_len, "positions are vectors: say how many there are"
            )
            fix = "half of the channels are sines: choose an even width"
            require(self.positions == "learned" or self.d_model % 2 == 0, "d_model", self.d_model, fix)
            return
        require(self.max_len == 0, "max_len", self.max_len, "relative positions have no limit: set 0")
        buckets, longest = self.relative_buckets, self.relative_max_distance
        require(
            buckets >= 4 and buckets % 2 == 0,
            "relative_buckets",
            buckets,
            "must be even and at least 4: half of the buckets are for keys after the query",
        )
        require(
            longest > buckets // 2,
            "relative_max_distance",
            longest,
            f"must exceed the {buckets // 2} distances that have a bucket of their own",
        )

    def _check_ids(self) -> None:
        optional = ("text_start_id", "forced_bos_id", "forced_eos_id")
        for field in ("decoder_start_id", "pad_id", "eos_ids", "suppressed_ids", *optional):
            value = getattr(self, field)
            if field in optional and value is None:
                continue
            ids = value if isinstance(value, tuple) else (value,)
            require(
                all(0 <= i < self.vocab_size for i in ids),
                field,
                value,
                f"must be in the vocabulary of {self.vocab_size}",
            )

    def whole_text(self, ids: Sequence[int]) -> list[int]:
        """Tokens of a text between the model's start and end tokens, as far as it has them."""
        starts = [] if self.text_start_id is None else [self.text_start_id]
        return [*starts, *ids, *self.eos_ids[:1]]

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads: as many as query heads."""
        return self.n_heads

    @property
    def layer(self) -> ModelConfig:
        """One layer in the words of the decoder families, whose attention, MLP and norm it shares."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=1,
            n_heads=self.n_heads,
            d_mlp=self.d_mlp,
            head_dim=self.head_dim,
            norm=self.norm,
            norm_eps=self.norm_eps,
            qkv_bias=self.biases,
            out_bias=self.biases,
            mlp_bias=self.biases,
            activation=self.activation,
            gated=self.gated,
            position="learned",  # nothing is rotated
            attn_scale=1.0 if self.positions == "relative" else self.head_dim**-0.5,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

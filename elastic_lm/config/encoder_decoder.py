"""Description of an encoder-decoder model: frozen, hashable, validated; static to every jitted function."""

import dataclasses
from typing import get_args

from elastic_lm.config.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    require,
    require_choice,
    require_each,
    require_layers,
    require_types,
)
from elastic_lm.config.model import DTYPES, Activation, ModelConfig


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """A T5 (arXiv 1910.10683): two stacks of pre-norm layers whose positions are biases of attention.

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
    relative_buckets: int = 32  # distances that have a bias of their own, both directions together
    relative_max_distance: int = 128  # tokens from which on all distances share a bias
    norm_eps: float = 1e-6  # added to the mean square
    tied: bool = True  # the vocabulary head is the embedding table
    scaled_head: bool = True  # the head reads the final state times d_model ** -0.5 (T5 1.0)
    n_labels: int = 0  # classes of a linear head on the encoder's mean state; 0 = no such head
    labels: tuple[str, ...] = ()  # names of these classes; () = they have none
    decoder_start_id: int = 0  # token that stands before every target
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
        require_each(self, "", ("norm_eps", "n_labels"), *NOT_NEGATIVE)
        require(
            len(self.labels) in (0, self.n_labels),
            "labels",
            self.labels,
            f"needs one name for each of n_labels={self.n_labels}, or none at all",
        )
        require_choice("activation", self.activation, get_args(Activation))
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("param_dtype", self.param_dtype, DTYPES)
        self._check_positions()
        self._check_ids()

    def _check_positions(self) -> None:
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
        for field in ("decoder_start_id", "pad_id", "eos_ids"):
            value = getattr(self, field)
            ids = value if isinstance(value, tuple) else (value,)
            require(
                all(0 <= i < self.vocab_size for i in ids),
                field,
                value,
                f"must be in the vocabulary of {self.vocab_size}",
            )

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
            norm_eps=self.norm_eps,
            activation=self.activation,
            gated=self.gated,
            position="learned",  # nothing is rotated
            attn_scale=1.0,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

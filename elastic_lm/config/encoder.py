"""The description of an encoder: a frozen, hashable, validated dataclass, static to every jitted function."""

import dataclasses
from typing import ClassVar, Literal, get_args

from elastic_lm.config.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    require,
    require_choice,
    require_each,
    require_layers,
    require_types,
)
from elastic_lm.config.model import DTYPES, Activation

Pooler = Literal["none", "tanh", "relu"]
Pooling = Literal["first", "mean"]
TaskProblem = Literal["classification", "regression"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional transformer with normalisation after each residual sum (BERT, arXiv 1810.04805).

    Fields that decoders have too mean what they mean in `config.ModelConfig`.

    Example:
      ```python
      import elastic_lm as el

      shape = {"vocab_size": 30522, "d_model": 128, "n_layers": 2, "n_heads": 2, "d_mlp": 512}
      config = el.EncoderConfig(**shape, n_labels=2, labels=("ham", "spam"))
      assert config.head_dim == 64
      ```
    """

    vocab_size: int  # rows of the embedding
    d_model: int  # width of the residual stream
    n_layers: int  # transformer layers
    n_heads: int  # attention heads
    d_mlp: int  # hidden width of the MLP
    max_len: int = 512  # longest supported sequence, in tokens
    type_vocab_size: int = 2  # token types (first and second text); 0 = the model has none
    position_offset: int = 0  # row of the first token's position; padding has the row before (RoBERTa: 2)
    norm_eps: float = 1e-12  # added to the variance
    activation: Activation = "gelu"  # MLP non-linearity, also of the masked language model's head
    pooler: Pooler = "tanh"  # non-linearity of the dense layer over the pooled state; none = no such layer
    pooling: Pooling = "first"  # what the pooler reads: the first token's state, or the mean of all tokens'
    n_labels: int = 0  # outputs of the task head; 0 = no task head
    problem: TaskProblem = "classification"  # what the task head's outputs are: logits of classes, or values
    labels: tuple[str, ...] = ()  # names of the outputs; () = they have none
    mlm: bool = False  # has a masked language model's head, whose kernel is the embedding
    exits: tuple[int, ...] = ()  # layers, counted from 1, with a pooler and a task head of their own behind
    pad_id: int = 0  # token that fills rows up
    dtype: str = "float32"  # dtype of activations
    param_dtype: str = "float32"  # dtype of stored parameters
    family: str = "bert"  # Hugging Face model_type this model is exported as

    gated: ClassVar[bool] = False  # of the MLP
    mlp_bias: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_types(self)
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "d_mlp", "max_len")
        require_each(self, "", sizes, *AT_LEAST_1)
        require_layers("n_layers", self.n_layers)
        counts = ("type_vocab_size", "position_offset", "norm_eps", "n_labels", "pad_id")
        require_each(self, "", counts, *NOT_NEGATIVE)
        require(
            self.d_model % self.n_heads == 0,
            "d_model",
            self.d_model,
            f"must be a multiple of n_heads={self.n_heads}",
        )
        for field, choices in (
            ("activation", get_args(Activation)),
            ("pooler", get_args(Pooler)),
            ("pooling", get_args(Pooling)),
            ("problem", get_args(TaskProblem)),
            ("dtype", DTYPES),
            ("param_dtype", DTYPES),
        ):
            require_choice(field, getattr(self, field), choices)
        require(
            not self.n_labels or self.pooler != "none",
            "pooler",
            self.pooler,
            "a task head reads what the pooler gives: choose tanh or relu",
        )
        require(
            len(self.labels) in (0, self.n_labels),
            "labels",
            self.labels,
            f"needs one name for each of n_labels={self.n_labels}, or none at all",
        )
        layers = isinstance(self.exits, tuple) and all(type(layer) is int for layer in self.exits)
        require(
            layers and list(self.exits) == sorted(set(self.exits)),
            "exits",
            self.exits,
            "must be a tuple of distinct layers in increasing order",
        )
        inside = all(1 <= layer < self.n_layers for layer in self.exits)
        require(
            inside,
            "exits",
            self.exits,
            f"must lie between 1 and {self.n_layers - 1}: the last layer has the model's own head",
        )
        require(
            not self.exits or self.n_labels > 0,
            "exits",
            self.exits,
            "are heads of a task, and n_labels=0; give the model a task head (in a Hugging Face folder "
            "`architectures` must name a classifier)",
        )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads; every query head has its own."""
        return self.n_heads

    @property
    def query_scale(self) -> float:
        """Factor applied to query-key products."""
        return self.head_dim**-0.5

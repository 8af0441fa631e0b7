"""The description of an encoder: a frozen, hashable, validated dataclass, static to every jitted function."""

import dataclasses
from typing import Literal, get_args

from elastic_lm.config.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    require,
    require_choice,
    require_each,
    require_layers,
    require_types,
)
from elastic_lm.config.model import DTYPES, Activation

Pooler = Literal["none", "tanh", "relu", "gelu"]
Pooling = Literal["first", "mean"]
TaskProblem = Literal["classification", "regression"]
Positions = Literal["learned", "rope", "none"]
Relative = Literal["none", "bias", "disentangled"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional transformer: BERT (arXiv 1810.04805) as the defaults say, or one of its relatives.

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
    embed_dim: int = 0  # width of the embeddings; 0 = d_model
    embed_map: bool = False  # a dense layer between embeddings and layers; another width needs it
    type_vocab_size: int = 2  # token types (first and second text); 0 = the model has none
    positions: Positions = "learned"  # a table, a rotation in every layer, or neither
    position_offset: int = 0  # row of the first token's position; padding has the row before (RoBERTa: 2)
    rope_theta: float = 160000.0  # rope: base of the wavelengths in layers that see everything
    local_rope_theta: float = 10000.0  # rope: base of the wavelengths in local layers
    window: int = 0  # width of what local layers see, a half on either side; 0 = no layer is local
    global_every: int = 3  # with a window, layers 0, n, 2n, ... see everything
    relative: Relative = (
        "none"  # what attention knows of distances: biases, or vectors of their own (DeBERTa)
    )
    relative_buckets: int = 32  # distances told apart: of biases both directions, of vectors each; 0 = all
    relative_max_distance: int = 128  # tokens from which on all distances share a bucket
    relative_norm: bool = False  # disentangled: the vectors of distances pass a norm
    conv_kernel: int = 0  # width of a convolution beside the first layer (DeBERTa v2 XL); 0 = none
    conv_activation: Literal["tanh", "gelu", "relu"] = "tanh"  # its non-linearity
    shared_layers: bool = False  # all layers are one (ALBERT)
    pre_norm: bool = False  # norms stand before attention and MLP, and one after the last layer
    biases: bool = True  # of projections and norms in the layers, and of poolers
    gated: bool = False  # MLP is act(gate) * up instead of act(up)
    norm_eps: float = 1e-12  # added to the variance
    activation: Activation = "gelu"  # MLP non-linearity, also of the masked language model's head
    pooler: Pooler = "tanh"  # non-linearity of the dense layer over the pooled state; none = no such layer
    pooler_norm: bool = False  # the dense layer's output is normalised
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

    def __post_init__(self) -> None:
        require_types(self)
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "d_mlp", "max_len")
        require_each(self, "", sizes, *AT_LEAST_1)
        require_layers("n_layers", self.n_layers)
        counts = ("type_vocab_size", "position_offset", "norm_eps", "n_labels", "pad_id")
        counts += ("embed_dim", "window", "relative_buckets", "conv_kernel")
        require_each(self, "", counts, *NOT_NEGATIVE)
        require(
            self.d_model % self.n_heads == 0,
            "d_model",
            self.d_model,
            f"must be a multiple of n_heads={self.n_heads}",
        )
        for field, choices in (
            ("activation", get_args(Activation)),
            ("positions", get_args(Positions)),
            ("relative", get_args(Relative)),
            ("conv_activation", ("tanh", "gelu", "relu")),
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
            "a task head reads what the pooler gives: choose gelu, tanh or relu",
        )
        require(
            len(self.labels) in (0, self.n_labels),
            "labels",
            self.labels,
            f"needs one name for each of n_labels={self.n_labels}, or none at all",
        )
        self._check_embeddings()
        self._check_distances()
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

    def _check_embeddings(self) -> None:
        object.__setattr__(self, "embed_dim", self.embed_dim or self.d_model)
        require(
            self.embed_map or self.embed_dim == self.d_model,
            "embed_map",
            self.embed_map,
            f"embed_dim={self.embed_dim} is not d_model={self.d_model}: set embed_dim=0, or embed_map=True",
        )
        require_each(self, "", ("rope_theta", "local_rope_theta"), *POSITIVE)
        require_each(self, "", ("global_every",), *AT_LEAST_1)
        fix = "half of a head turns against the other half: choose an even width of heads"
        require(self.positions != "rope" or self.head_dim % 2 == 0, "head_dim", self.head_dim, fix)
        fix = "the last column of a convolution stands in its middle: choose an odd width, or 0"
        require(not self.conv_kernel or self.conv_kernel % 2 == 1, "conv_kernel", self.conv_kernel, fix)

    def _check_distances(self) -> None:
        buckets, longest = self.relative_buckets, self.relative_max_distance
        if self.relative == "bias":
            fix = "must be even and at least 4: half of the buckets are for keys after the query"
            require(buckets >= 4 and buckets % 2 == 0, "relative_buckets", buckets, fix)
        if self.relative == "disentangled":
            fix = "must be 0 (every distance has a vector), or even and at least 4"
            right = buckets == 0 or (buckets >= 4 and buckets % 2 == 0)
            require(right, "relative_buckets", buckets, fix)
        if self.relative != "none":
            fix = f"must exceed the {buckets // 2} distances that have a bucket of their own by more than 1"
            require(longest > buckets // 2 + 1, "relative_max_distance", longest, fix)

    @property
    def distances(self) -> int:
        """Vectors of distances in one direction (disentangled attention)."""
        return self.relative_buckets or self.relative_max_distance

    def local(self, layer: int) -> bool:
        """Whether a layer, counted from 0, sees a window only."""
        return self.window > 0 and layer % self.global_every > 0

    @property
    def mlp_bias(self) -> bool:
        """Whether the MLP has biases."""
        return self.biases

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
        """Factor applied to query-key products, of which disentangled attention adds three up."""
        return (self.head_dim * (3 if self.relative == "disentangled" else 1)) ** -0.5

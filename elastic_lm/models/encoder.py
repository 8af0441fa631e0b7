"""The bidirectional encoder: embed -> layers -> pooled state -> task logits, read top-down.

    h_0      = norm(token + position + type embeddings)
    h_l      = layer_l(h_{l-1})                        l = 1 .. L
    logits   = W' f(W pool(h_L) + b) + b'              pool: the first token's state, or the mean
    logits_l = W'_l f(W_l mean(h_l) + b_l) + b'_l      for every exit after a layer l

Exits read the mean state, since the first token of a lower layer has seen little of the sentence. Where norms
stand in front of the layers' parts (ModernBERT), all that reads states reads them through the final norm.

Parameters have one canonical form: `embed`, `positions`, `types`, `embed_norm`, one sub-tree per layer
(`layers_0`, `layers_1`, ...; `layers_0` alone where all layers are one), `pooler`, `head` (the task's),
`token_head` (a masked language model's) and `exit_<layer>` for every exit; in some families also `embed_map`,
`relative_bias`, `distances`, `distance_norm`, `convolution` and `final_norm`. Encoders have few layers and
train in this form too, layer by layer, so that no second form of their parameters is needed.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.models.decoder import Embedding
from elastic_lm.nn.disentangled import Distances, distance_index
from elastic_lm.nn.encoder import (
    Convolution,
    EncoderBlock,
    EncoderContext,
    Pooler,
    TokenHead,
    encoder_norm,
    rotation_of,
)
from elastic_lm.nn.linear import Linear
from elastic_lm.nn.placement import by_rows, whole_width
from elastic_lm.nn.relative_position import RelativeBias


@flax.struct.dataclass
class EncoderOutput:
    """What one forward pass gives.

    Attributes:
      hidden: [B, T, D] states of the last layer that ran.
      pooled: [B, D] what task heads read; None where the model has no pooler.
      logits: [B, C] float32 of the task head (values, for regression); None where there is none.
      token_logits: [B, T, V] float32 of the masked language model's head; None unless asked for.
    """

    hidden: jax.Array
    pooled: jax.Array | None
    logits: jax.Array | None
    token_logits: jax.Array | None


class Encoder(nn.Module):
    """A bidirectional transformer: BERT (arXiv 1810.04805) and its relatives.

    These are RoBERTa (1907.11692), DistilBERT (1910.01108), ELECTRA (2003.10555), ALBERT (1909.11942),
    MPNet (2004.09297), DeBERTa v2 and v3 (2006.03654, 2111.09543), and ModernBERT (2412.13663).

    Attributes:
      config: architecture and heads; static.

    Example:
      ```python
      import elastic_lm as el
      import jax

      config = el.EncoderConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_mlp=64, n_labels=3)
      params = el.init_params(config, jax.random.key(0))
      tokens = jax.numpy.asarray([[2, 7, 5, 3]])
      output = jax.jit(el.Encoder(config).apply)({"params": params}, tokens)
      assert output.logits.shape == (1, 3)
      ```
    """

    config: EncoderConfig

    def setup(self) -> None:
        c = self.config
        width, dtype = c.embed_dim, c.param_dtype
        self.embedding = Embedding(c.vocab_size, width, ("vocab", "embed"), dtype, name="embed")
        if c.positions == "learned":
            rows = c.max_len + c.position_offset
            self.positions = Embedding(rows, width, (None, "embed"), dtype, name="positions")
        if c.type_vocab_size:
            self.types = Embedding(c.type_vocab_size, width, (None, "embed"), dtype, name="types")
        self.embed_norm = encoder_norm(c, "embed_norm")
        if c.embed_map:
            self.mapping = Linear((c.d_model,), ("embed", None), True, dtype, name="embed_map")

        if c.relative == "bias":
            self.relative_bias = RelativeBias(c, both_directions=True, name="relative_bias")
        if c.relative == "disentangled":
            self.distances = Embedding(2 * c.distances, c.d_model, (None, "embed"), dtype, name="distances")
            if c.relative_norm:
                self.distance_norm = encoder_norm(c, "distance_norm")
        blocks = 1 if c.shared_layers else c.n_layers
        self.layers = [EncoderBlock(c, i, name=f"layers_{i}") for i in range(blocks)]
        if c.conv_kernel:
            self.convolution = Convolution(c, name="convolution")
        if c.pre_norm:
            self.final_norm = encoder_norm(c, "final_norm")

        if c.pooler != "none":
            self.pooling = Pooler(c, name="pooler")
        if c.n_labels:
            self.task_head = dense(c, c.n_labels, "head")
        self.exits = {layer: TaskExit(c, name=exit_name(layer)) for layer in c.exits}
        if c.mlm:
            self.token_head = TokenHead(c, name="token_head")

    def __call__(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        *,
        depth: int | None = None,
        token_logits: bool = False,
    ) -> EncoderOutput:
        """Runs the model.

        Args:
          tokens_BT: int32 token ids.
          mask_BT: bool or int, 0 at padding, which no token attends to; None = no padding. A model whose
            positions have an offset (RoBERTa) numbers its tokens by `pad_id`, whatever the mask is.
          types_BT: int32 token types; None = all 0.
          depth: layers that run, static; None = all.
          token_logits: also run the masked language model's head; static.

        Returns:
          The states, and the outputs of the heads.

        Raises:
          ValueError: rows are longer than `max_len`, or `token_logits` needs a head that the model lacks.
        """
        hidden = self.states(tokens_BT, mask_BT, types_BT, depth)
        pooled = self.pool(hidden, mask_BT) if self.config.pooler != "none" else None
        logits = self.task_logits(pooled) if self.config.n_labels and pooled is not None else None

        # Linen creates the parameters of what runs.
        if self.is_initializing():
            for exit_ in self.exits.values():
                exit_(self.mean(hidden, mask_BT))
            if self.config.mlm:
                self.token_logits(hidden)

        found = self.token_logits(hidden) if token_logits else None
        return EncoderOutput(self.normed(hidden), pooled, logits, found)

    def states(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        depth: int | None = None,
    ) -> jax.Array:
        """States [B, T, D] after the first layers, from which `run_layers` goes on; before a final norm.

        Args:
          tokens_BT: as in `__call__`.
          mask_BT: as in `__call__`.
          types_BT: as in `__call__`.
          depth: layers that run, static; None = all.
        """
        hidden = self.embed(tokens_BT, types_BT)
        return self.run_layers(hidden, mask_BT, 0, self.config.n_layers if depth is None else depth)

    def embed(self, tokens_BT: jax.Array, types_BT: jax.Array | None = None) -> jax.Array:
        """Normalised sum of embeddings that enters the first layer [B, T, D]; arguments as in `__call__`."""
        c = self.config
        length = tokens_BT.shape[1]
        require(
            length <= c.max_len,
            "tokens.shape[1]",
            length,
            f"the model reads at most max_len={c.max_len} tokens; truncate",
        )

        hidden = whole_width(self.embedding())[tokens_BT]
        if c.positions == "learned":
            hidden = hidden + whole_width(self.positions())[position_ids(c, tokens_BT)]
        if c.type_vocab_size:
            table = whole_width(self.types())
            hidden = hidden + (table[0] if types_BT is None else table[types_BT])
        hidden = self.embed_norm(by_rows(hidden.astype(c.dtype)))
        return self.mapping(hidden) if c.embed_map else hidden

    def run_layers(
        self, hidden_BTD: jax.Array, mask_BT: jax.Array | None, start: int, stop: int
    ) -> jax.Array:
        """Runs layers start .. stop-1 (static).

        Args:
          hidden_BTD: state that enters layer `start`.
          mask_BT: as in `__call__`.
          start: first layer, counted from 0.
          stop: one past the last layer.

        Returns:
          [B, T, D] state that enters layer `stop`.

        Raises:
          ValueError: the model has no such layers.
        """
        require(
            0 <= start <= stop <= self.config.n_layers,
            "start, stop",
            (start, stop),
            f"must be layers in order, of n_layers={self.config.n_layers}",
        )
        context = self.context(default_mask(hidden_BTD, mask_BT))
        for i in range(start, stop):
            entering_BTD, layer = hidden_BTD, self.layers[0 if self.config.shared_layers else i]
            hidden_BTD = by_rows(layer(entering_BTD, context))
            if i == 0 and self.config.conv_kernel:
                hidden_BTD = self.convolution(entering_BTD, hidden_BTD, context.mask)
        return hidden_BTD

    def context(self, mask_BT: jax.Array) -> EncoderContext:
        """What all layers know of a batch: padding (`mask_BT`, bool), and positions as they read them."""
        c, length = self.config, mask_BT.shape[1]
        place_T = jnp.arange(length, dtype=jnp.int32)
        biases = distances = rotations = None
        if c.relative == "bias":
            biases = self.relative_bias(place_T, place_T)
        if c.relative == "disentangled":
            vectors = self.distances().astype(c.dtype)
            vectors = self.distance_norm(vectors) if c.relative_norm else vectors
            index = distance_index(length, c.relative_buckets, c.relative_max_distance)
            distances = Distances(vectors, jnp.asarray(index))
        if c.positions == "rope":
            everywhere = rotation_of(c.rope_theta, c.head_dim, place_T)
            nearby = rotation_of(c.local_rope_theta, c.head_dim, place_T)
            # Without the barrier, XLA's CPU backend computes sines and cosines again in every layer.
            rotations = jax.lax.optimization_barrier((everywhere, nearby))
        return EncoderContext(mask_BT, biases, distances, rotations)

    def normed(self, hidden: jax.Array) -> jax.Array:
        """States [..., D] of any layer as heads and exits see them: through a final norm, if there is one."""
        return self.final_norm(hidden) if self.config.pre_norm else hidden

    def mean(self, hidden_BTD: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
        """`mean_state` [B, D] of states, through the final norm."""
        return mean_state(self.normed(hidden_BTD), mask_BT)

    def all_logits(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        *,
        last: bool = True,
    ) -> list[jax.Array]:
        """[B, C] float32 outputs of every exit, in order, and of the task head, in one pass.

        Args:
          tokens_BT: as in `__call__`.
          mask_BT: as in `__call__`.
          types_BT: as in `__call__`.
          last: also run the layers above the last exit, and the task head; static.
        """
        hidden, start, logits = self.embed(tokens_BT, types_BT), 0, []
        for layer, exit_ in self.exits.items():
            hidden = self.run_layers(hidden, mask_BT, start, layer)
            logits.append(exit_(self.mean(hidden, mask_BT)))
            start = layer
        if last:
            hidden = self.run_layers(hidden, mask_BT, start, self.config.n_layers)
            logits.append(self.task_logits(self.pool(hidden, mask_BT)))
        return logits

    def pool(self, hidden_BTD: jax.Array, mask_BT: jax.Array | None = None) -> jax.Array:
        """f(W h + b) [B, D], which task heads read; h is the first token's state or the mean (`pooling`)."""
        c = self.config
        self._require_part("pooler", c.pooler != "none")
        state_BD = self.mean(hidden_BTD, mask_BT) if c.pooling == "mean" else self.normed(hidden_BTD[:, 0])
        return by_rows(self.pooling(by_rows(state_BD)))

    def task_logits(self, pooled_BD: jax.Array) -> jax.Array:
        """[B, C] float32 outputs of the task head."""
        self._require_part("n_labels", self.config.n_labels > 0)
        return self.task_head(pooled_BD.astype(jnp.float32))

    def token_logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32 logits of the masked language model's head."""
        self._require_part("mlm", self.config.mlm)
        return self.token_head(self.normed(hidden_BTD), self.embedding())

    def _require_part(self, field: str, has_part: bool) -> None:
        require(
            has_part,
            field,
            getattr(self.config, field),
            "the model lacks this part: load a checkpoint that has it, or attach_task_head",
        )


class TaskExit(nn.Module):
    """W' f(W h + b) + b': a pooler and a task head of an earlier layer's own."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, state_BD: jax.Array) -> jax.Array:
        """Returns [B, C] float32 outputs from the mean state."""
        c = self.config
        pooled = Pooler(c, name="pooler")(state_BD)
        return dense(c, c.n_labels, "head")(pooled.astype(jnp.float32))


def mean_state(hidden_BTD: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
    """Mean [B, D] of the states of all tokens but padding; summed in float32.

    Args:
      hidden_BTD: states.
      mask_BT: bool or int, 0 at padding; None = no padding.
    """
    mask_BT = default_mask(hidden_BTD, mask_BT)
    total_BD = jnp.sum(jnp.where(mask_BT[..., None], hidden_BTD.astype(jnp.float32), 0.0), axis=1)
    count_B1 = jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1)
    return (total_BD / count_B1).astype(hidden_BTD.dtype)


def default_mask(like_BT: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
    """[B, T] bool: `mask_BT`, or True for every token."""
    return jnp.ones(like_BT.shape[:2], bool) if mask_BT is None else mask_BT.astype(bool)


def exit_name(layer: int) -> str:
    """Key of an exit's parameters."""
    return f"exit_{layer}"


def dense(c: EncoderConfig, features: int, name: str | None = None) -> Linear:
    """A task head: a projection of a pooled state."""
    return Linear((features,), (None, "embed"), True, c.param_dtype, name=name)


def position_ids(c: EncoderConfig, tokens_BT: jax.Array) -> jax.Array:
    """Which entry of the position table each token has.

    With an offset (RoBERTa) only tokens other than `pad_id` are counted, whatever the attention mask is: rows
    must be filled up with `pad_id`, wherever padding stands.

    Args:
      c: the model; static.
      tokens_BT: int32 token ids.

    Returns:
      [B, T] int32: 0 .. T-1; with an offset the count of tokens plus it, and for padding the entry before it.
    """
    if not c.position_offset:
        return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    counted = (tokens_BT != c.pad_id).astype(jnp.int32)
    return jnp.cumsum(counted, axis=1) * counted + c.position_offset - 1

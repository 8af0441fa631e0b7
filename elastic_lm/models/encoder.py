"""The bidirectional encoder: embed -> layers -> pooled first token -> task logits, read top-down.

Parameters have one canonical form: `embed`, `positions`, `types`, `embed_norm`, one sub-tree per layer
(`layers_0`, `layers_1`, ...), `pooler`, `head` (the task's), `token_head` (a masked language model's) and for
every exit `exit_<layer>`, a pooler and a head of its own that answer the task from the mean state after so
many layers: the first token of a lower layer has seen little of the sentence.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.models.decoder import Embedding, Params
from elastic_lm.nn.encoder import EncoderBlock, TokenHead, encoder_norm
from elastic_lm.nn.linear import Linear

POOLERS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


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
    """A bidirectional transformer (BERT, arXiv 1810.04805; RoBERTa, 1907.11692; DistilBERT, 1910.01108).

    Attributes:
      config: architecture and heads; static.
    """

    config: EncoderConfig

    def setup(self) -> None:
        c = self.config
        width, dtype = c.d_model, c.param_dtype
        self.embedding = Embedding(c.vocab_size, width, ("vocab", "embed"), dtype, name="embed")
        rows = c.max_len + c.position_offset
        self.positions = Embedding(rows, width, (None, "embed"), dtype, name="positions")
        if c.type_vocab_size:
            self.types = Embedding(c.type_vocab_size, width, (None, "embed"), dtype, name="types")
        self.embed_norm = encoder_norm(c, "embed_norm")
        self.layers = [EncoderBlock(c, name=f"layers_{i}") for i in range(c.n_layers)]
        if c.pooler != "none":
            self.pooling = dense(c, width, "pooler")
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
          mask_BT: bool or int, 0 at padding, which no token then sees; None = no padding. Positions with
            an offset are counted by `pad_id`, whatever the mask is (`positions`).
          types_BT: int32 token types; None = all 0.
          depth: layers that run, static; None = all.
          token_logits: also run the masked language model's head; static.

        Raises:
          ValueError: rows are longer than `max_len`, or the model lacks what is asked for.
        """
        hidden = self.states(tokens_BT, mask_BT, types_BT, depth)
        pooled = self.pool(hidden, mask_BT) if self.config.pooler != "none" else None
        logits = self.task_logits(pooled) if self.config.n_labels and pooled is not None else None
        if self.is_initializing():
            for exit_ in self.exits.values():
                exit_(mean_state(hidden, mask_BT))
            if self.config.mlm:
                self.token_logits(hidden)
        return EncoderOutput(hidden, pooled, logits, self.token_logits(hidden) if token_logits else None)

    def states(
        self,
        tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        depth: int | None = None,
    ) -> jax.Array:
        """States [B, T, D] after the first layers, which `run_layers` goes on from.

        Args:
          tokens_BT: as in `__call__`, like the following two.
          mask_BT: likewise.
          types_BT: likewise.
          depth: layers that run, static; None = all.
        """
        hidden = self.embed(tokens_BT, types_BT)
        return self.run_layers(hidden, mask_BT, 0, self.config.n_layers if depth is None else depth)

    def embed(self, tokens_BT: jax.Array, types_BT: jax.Array | None = None) -> jax.Array:
        """Normalised sum [B, T, D] of token, position and type embeddings; arguments as in `__call__`."""
        c = self.config
        length = tokens_BT.shape[1]
        fix = f"the model reads at most max_len={c.max_len} tokens; truncate"
        require(length <= c.max_len, "tokens.shape[1]", length, fix)
        hidden = self.embedding()[tokens_BT] + self.positions()[positions(c, tokens_BT)]
        if c.type_vocab_size:
            table = self.types()
            hidden = hidden + (table[0] if types_BT is None else table[types_BT])
        return self.embed_norm(hidden.astype(c.dtype))

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
        fits = 0 <= start <= stop <= self.config.n_layers
        fix = f"must be layers in order, of n_layers={self.config.n_layers}"
        require(fits, "start, stop", (start, stop), fix)
        there = jnp.ones(hidden_BTD.shape[:2], bool) if mask_BT is None else mask_BT.astype(bool)
        for layer in self.layers[start:stop]:
            hidden_BTD = layer(hidden_BTD, there)
        return hidden_BTD

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
          tokens_BT: as in `__call__`, like the following two.
          mask_BT: likewise.
          types_BT: likewise.
          last: with the task head; else the pass ends at the last exit. Static.
        """
        hidden, start, found = self.embed(tokens_BT, types_BT), 0, []
        for layer, exit_ in self.exits.items():
            hidden = self.run_layers(hidden, mask_BT, start, layer)
            found.append(exit_(mean_state(hidden, mask_BT)))
            start = layer
        if last:
            hidden = self.run_layers(hidden, mask_BT, start, self.config.n_layers)
            found.append(self.task_logits(self.pool(hidden, mask_BT)))
        return found

    def pool(self, hidden_BTD: jax.Array, mask_BT: jax.Array | None = None) -> jax.Array:
        """f(W h + b) [B, D], which task heads read, of the first token's state or the mean (`pooling`)."""
        c = self.config
        self._require_part("pooler", c.pooler != "none")
        state_BD = mean_state(hidden_BTD, mask_BT) if c.pooling == "mean" else hidden_BTD[:, 0]
        return POOLERS[c.pooler](self.pooling(state_BD))

    def task_logits(self, pooled_BD: jax.Array) -> jax.Array:
        """[B, C] float32 outputs of the task head."""
        self._require_part("n_labels", self.config.n_labels > 0)
        return self.task_head(pooled_BD.astype(jnp.float32))

    def token_logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32 logits of the masked language model's head."""
        self._require_part("mlm", self.config.mlm)
        return self.token_head(hidden_BTD, self.embedding())

    def _require_part(self, field: str, there: bool) -> None:
        fix = "the model lacks this part: load a checkpoint that has it, or attach_task_head"
        require(there, field, getattr(self.config, field), fix)


class TaskExit(nn.Module):
    """W' f(W h + b) + b': what the task's pooler and head are to the last layer, for an earlier one."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, state_BD: jax.Array) -> jax.Array:
        """Returns [B, C] float32 outputs from the mean state."""
        c = self.config
        pooled = POOLERS[c.pooler](dense(c, c.d_model, "pooler")(state_BD))
        return dense(c, c.n_labels, "head")(pooled.astype(jnp.float32))


def mean_state(hidden_BTD: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
    """Mean [B, D] of the states of the tokens that a mask leaves; summed in float32.

    Args:
      hidden_BTD: states.
      mask_BT: bool or int, 0 at padding; None = no padding.
    """
    there = jnp.ones(hidden_BTD.shape[:2], bool) if mask_BT is None else mask_BT.astype(bool)
    total_BD = jnp.sum(jnp.where(there[..., None], hidden_BTD.astype(jnp.float32), 0.0), axis=1)
    count_B1 = jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)
    return (total_BD / count_B1).astype(hidden_BTD.dtype)


def exit_name(layer: int) -> str:
    """Key of an exit's parameters."""
    return f"exit_{layer}"


def dense(c: EncoderConfig, features: int, name: str | None = None) -> Linear:
    """A projection of the pooled state, as poolers and heads are."""
    return Linear((features,), (None, "embed"), True, c.param_dtype, name=name)


def positions(c: EncoderConfig, tokens_BT: jax.Array) -> jax.Array:
    """Rows of the position table: 0 .. T-1, or with an offset the count of tokens but `pad_id` (RoBERTa).

    Masks do not count: rows must be filled up with `pad_id`, wherever padding stands.

    Args:
      c: the model; static.
      tokens_BT: int32 token ids.

    Returns:
      [B, T] int32; with an offset, padding has the row before it.
    """
    if not c.position_offset:
        return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    there = (tokens_BT != c.pad_id).astype(jnp.int32)
    return jnp.cumsum(there, axis=1) * there + c.position_offset - 1


def abstract_params(config: EncoderConfig) -> Params:
    """Shapes, dtypes and logical axis names of the canonical parameters, without memory.

    Returns:
      A tree of `flax.linen.LogicallyPartitioned` boxes around `jax.ShapeDtypeStruct`.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Encoder(config).init, jax.random.key(0), tokens)["params"]


def init_params(config: EncoderConfig, key: jax.Array) -> Params:
    """Draws canonical parameters: kernels and tables N(0, 0.02), biases 0, norms the identity.

    Args:
      config: architecture; static.
      key: typed PRNG key. Every tensor's draw depends on the key and the tensor's path alone.

    Returns:
      Canonical parameters, unboxed.
    """
    variables = jax.jit(Encoder(config).init)(key, jnp.zeros((1, 1), jnp.int32))
    return nn.unbox(variables["params"])

"""Layers of encoder-decoder models: self-attention with biases of distance, attention to the source, MLP."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.nn.attention import HIDDEN_POSITION, Attention, KeyValues, NewKeyValues, attend
from elastic_lm.nn.block import make_norm
from elastic_lm.nn.linear import Linear
from elastic_lm.nn.mlp import MLP
from elastic_lm.nn.relative_position import RelativeBias


def seen_by_all(mask_BS: jax.Array) -> jax.Array:
    """Positions with which `attend` shows what counts to every query at 0, and padding to none.

    Args:
      mask_BS: bool, True for tokens that count.

    Returns:
      [B, S] int32.
    """
    return jnp.where(mask_BS, 0, HIDDEN_POSITION)


class CrossAttention(nn.Module):
    """Attention of the decoder to the encoder's output; keys and values are computed once per source.

    `kv` holds, for every head, its key and its value in one kernel [N, 2, H, D].
    """

    config: EncoderDecoderConfig

    def setup(self) -> None:
        c = self.config
        self.q = Linear((c.n_heads, c.head_dim), ("kv_heads", None, "embed"), param_dtype=c.param_dtype)
        axes = ("kv_heads", None, None, "embed")
        self.kv = Linear((c.n_heads, 2, c.head_dim), axes, param_dtype=c.param_dtype)
        self.out = Linear((c.d_model,), ("embed", "heads"), param_dtype=c.param_dtype)

    def key_values(self, source_BSD: jax.Array) -> NewKeyValues:
        """Keys and values [B, N, S, H] of the encoder's output."""
        k, v = jnp.moveaxis(self.kv(source_BSD), 3, 0)  # [B, S, N, H] each
        return jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)

    def __call__(self, x_BTD: jax.Array, source: KeyValues) -> jax.Array:
        """Attends to the source.

        Args:
          x_BTD: normalised input.
          source: from `key_values`, with the positions of `seen_by_all`.

        Returns:
          [B, T, D].
        """
        here_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
        out = attend(self.q(x_BTD), [source], here_BT, scale=1.0)
        return self.out(out.reshape(*out.shape[:2], math.prod(out.shape[2:])))


class Layer(nn.Module):
    """a = x + attn(norm(x)); in a decoder a = a + cross(norm(a), source); y = a + mlp(norm(a)).

    Attributes:
      config: the model; static.
      decodes: whether the layer attends to a source and its self-attention looks back alone; static.
      first: whether it holds its stack's biases of distance; static.
    """

    config: EncoderDecoderConfig
    decodes: bool
    first: bool

    def setup(self) -> None:
        c = self.config.layer
        self.attn_norm = make_norm(c, "attn_norm")
        self.attn = Attention(c, name="attn")
        if self.first:
            self.bias = RelativeBias(self.config, not self.decodes, name="relative_bias")
        if self.decodes:
            self.cross_norm = make_norm(c, "cross_norm")
            self.cross = CrossAttention(self.config, name="cross")
        self.mlp_norm = make_norm(c, "mlp_norm")
        self.mlp = MLP(c, name="mlp")

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        biases: Sequence[jax.Array],
        *,
        past: KeyValues | None = None,
        source: KeyValues | None = None,
    ) -> tuple[jax.Array, NewKeyValues]:
        """Runs the layer.

        Args:
          x_BTD: input of the layer.
          positions_BT: int32; a token sees those at its own position and below it.
          biases: [N, T, S] float32 of distances; of `past` and of the tokens, or of these alone.
          past: the layer's cached keys and values, or None.
          source: keys and values of the source; a decoder needs them.

        Returns:
          ([B, T, D], new keys and values of self-attention [B, N, T, H]).
        """
        attended, new_kv = self.attn(self.attn_norm(x_BTD), positions_BT, past=past, biases=biases)
        hidden = x_BTD + attended
        if self.decodes:
            assert source is not None
            hidden = hidden + self.cross(self.cross_norm(hidden), source)
        return hidden + self.mlp(self.mlp_norm(hidden)), new_kv

"""One layer of an encoder-decoder model (T5, arXiv 1910.10683; BART, 1910.13461).

    a = x + attn(norm(x))               a = norm(x + attn(x))             in T5 with biases of distance
    a = a + cross(norm(a), source)      a = norm(a + cross(a, source))    in a decoder
    y = a + mlp(norm(a))                y = norm(a + mlp(a))              T5 on the left, BART on the right

T5's attention does not scale its logits: new models draw small queries instead
(`models.encoder_decoder.draw_param`).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.nn.attention import Attention, AttentionContext, KeyValues, NewKeyValues, attend
from elastic_lm.nn.block import make_norm
from elastic_lm.nn.linear import Linear
from elastic_lm.nn.mlp import MLP
from elastic_lm.nn.relative_position import RelativeBias


class Layer(nn.Module):
    """A layer of the encoder or of the decoder.

    Attributes:
      config: the model; static.
      decodes: whether the layer attends to a source, and its self-attention looks back only; static.
      has_bias: whether the layer holds biases of distance, its own or those of its whole stack; static.
    """

    config: EncoderDecoderConfig
    decodes: bool
    has_bias: bool

    def setup(self) -> None:
        c = self.config.layer
        self.attn_norm = make_norm(c, "attn_norm")
        self.attn = Attention(c, name="attn")
        if self.has_bias:
            self.bias = RelativeBias(self.config, both_directions=not self.decodes, name="relative_bias")
        if self.decodes:
            self.cross_norm = make_norm(c, "cross_norm")
            self.cross = CrossAttention(self.config, name="cross")
        self.mlp_norm = make_norm(c, "mlp_norm")
        self.mlp = MLP(c, name="mlp")

    def __call__(
        self, x_BTD: jax.Array, context: AttentionContext, source: KeyValues | None = None
    ) -> tuple[jax.Array, NewKeyValues]:
        """Runs the layer.

        Args:
          x_BTD: input of the layer.
          context: positions of the tokens, and what their self-attention sees; with biases.
          source: keys and values of the source; a decoder needs them.

        Returns:
          ([B, T, D], new keys and values of self-attention).
        """
        if self.config.pre_norm:
            attended, new_kv = self.attn(self.attn_norm(x_BTD), context)
            hidden = x_BTD + attended
            if self.decodes:
                assert source is not None
                hidden = hidden + self.cross(self.cross_norm(hidden), source)
            return hidden + self.mlp(self.mlp_norm(hidden)), new_kv

        attended, new_kv = self.attn(x_BTD, context)
        hidden = self.attn_norm(x_BTD + attended)
        if self.decodes:
            assert source is not None
            hidden = self.cross_norm(hidden + self.cross(hidden, source))
        return self.mlp_norm(hidden + self.mlp(hidden)), new_kv


class CrossAttention(nn.Module):
    """Attention of the decoder to the encoder's output; keys and values are computed once per source.

    `kv` holds, for every head, its key and its value in one kernel [N, 2, H, D].
    """

    config: EncoderDecoderConfig

    def setup(self) -> None:
        c, rest = self.config, (self.config.biases, self.config.param_dtype)
        self.q = Linear((c.n_heads, c.head_dim), ("kv_heads", None, "embed"), *rest)
        self.kv = Linear((c.n_heads, 2, c.head_dim), ("kv_heads", None, None, "embed"), *rest)
        self.out = Linear((c.d_model,), ("embed", "heads"), *rest)

    def __call__(self, x_BTD: jax.Array, source: KeyValues) -> jax.Array:
        """Attends to the source.

        Args:
          x_BTD: normalised input.
          source: from `key_values`, with the positions of `seen_by_all`.

        Returns:
          [B, T, D].
        """
        here_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
        scale = self.config.layer.query_scale
        out = attend(self.q(x_BTD), source, AttentionContext(here_BT), scale=scale)
        return self.out(out.reshape(*out.shape[:2], math.prod(out.shape[2:])))

    def key_values(self, source_BSD: jax.Array) -> NewKeyValues:
        """Keys and values [B, N, S, H] of the encoder's output."""
        k, v = jnp.moveaxis(self.kv(source_BSD), 3, 0)  # [B, S, N, H] each
        return jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)

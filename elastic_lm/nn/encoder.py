"""One layer of a bidirectional encoder (BERT, arXiv 1810.04805), and the head of its masked language model.

    a = norm(x + attn(x))
    y = norm(a + mlp(a))

Attention looks in both directions. A mask says which tokens are padding, which none of the others sees.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.nn.attention import AttentionContext, KeyValues, attend, seen_by_all
from elastic_lm.nn.linear import Linear, linear
from elastic_lm.nn.mlp import ACTIVATIONS, MLP
from elastic_lm.nn.norm import Norm
from elastic_lm.nn.partition import partitioned


class EncoderBlock(nn.Module):
    """One layer; every norm stands after its residual sum."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Runs the layer.

        Args:
          x_BTD: input of the layer, h_{l-1}.
          mask_BT: bool, False at padding.

        Returns:
          [B, T, D] output of the layer, h_l.
        """
        c = self.config
        attended = EncoderAttention(c, name="attn")(x_BTD, mask_BT)
        middle = encoder_norm(c, "attn_norm")(x_BTD + attended)
        return encoder_norm(c, "mlp_norm")(middle + MLP(c, name="mlp")(middle))


class EncoderAttention(nn.Module):
    """Projections and attention of one layer; `qkv` is laid out as a decoder's, [N, 3, H, D]."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Attends to all tokens where the boolean mask is True; returns [B, T, D]."""
        c = self.config
        axes = ("kv_heads", None, None, "embed")
        qkv = Linear((c.n_heads, 3, c.head_dim), axes, True, c.param_dtype, name="qkv")(x_BTD)
        q, k, v = (qkv[:, :, :, i] for i in range(3))

        # Queries all stand at position 0, and so do the keys that they see: attention in both directions.
        keys = KeyValues(jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), seen_by_all(mask_BT))
        here_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
        out = attend(q, keys, AttentionContext(here_BT), scale=c.head_dim**-0.5)

        out = out.reshape(x_BTD.shape)
        return Linear((c.d_model,), ("embed", "heads"), True, c.param_dtype, name="out")(out)


class TokenHead(nn.Module):
    """norm(f(W h + b)) E^T + c: a masked language model's head over the embedding E."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        """Returns [B, T, V] float32 logits."""
        c = self.config
        dense = Linear((c.d_model,), (None, "embed"), True, c.param_dtype, name="dense")
        features = encoder_norm(c, "norm")(ACTIVATIONS[c.activation](dense(hidden_BTD)))
        zeros = partitioned(nn.initializers.zeros, ("vocab",))
        bias = self.param("bias", zeros, (c.vocab_size,), c.param_dtype)
        return linear(features, table_VD, bias, dtype=jnp.float32)


def encoder_norm(c: EncoderConfig, name: str) -> Norm:
    """A layer normalisation of the model.

    Args:
      c: the model; static.
      name: key of its parameters.
    """
    return Norm("layernorm", c.norm_eps, 0.0, c.param_dtype, name=name)

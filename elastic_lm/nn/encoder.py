"""Encoder layers: attention in both directions and an MLP, each normalised after its residual sum."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.nn.attention import HIDDEN_POSITION, KeyValues, attend
from elastic_lm.nn.linear import Linear, linear
from elastic_lm.nn.mlp import ACTIVATIONS, MLP
from elastic_lm.nn.norm import Norm
from elastic_lm.nn.partition import partitioned


def attend_all(q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over every key that the mask leaves, before and after the query.

    Args:
      q_BTNH: queries.
      k_BSNH: keys.
      v_BSNH: values.
      mask_BS: bool, False where no query may see the key.

    Returns:
      [B, T, N, H] in the dtype of `q_BTNH`; probabilities are float32.
    """
    # To `attend`, what every query may see lies at position 0, and the rest never comes.
    positions_BS = jnp.where(mask_BS, 0, HIDDEN_POSITION).astype(jnp.int32)
    keys = KeyValues(jnp.moveaxis(k_BSNH, 1, 2), jnp.moveaxis(v_BSNH, 1, 2), positions_BS)
    scale = q_BTNH.shape[-1] ** -0.5
    return attend(q_BTNH, [keys], jnp.zeros(q_BTNH.shape[:2], jnp.int32), scale=scale)


def encoder_norm(c: EncoderConfig, name: str) -> Norm:
    """A layer normalisation of the model.

    Args:
      c: the model; static.
      name: key of its parameters.
    """
    return Norm("layernorm", c.norm_eps, 0.0, c.param_dtype, name=name)


class EncoderAttention(nn.Module):
    """Projections and attention of one layer; `qkv` is laid out as a decoder's, [N, 3, H, D]."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Attends over all tokens that the mask (bool) leaves; returns [B, T, D]."""
        c = self.config
        axes = ("kv_heads", None, None, "embed")
        qkv = Linear((c.n_heads, 3, c.head_dim), axes, True, c.param_dtype, name="qkv")(x_BTD)
        q, k, v = (qkv[:, :, :, i] for i in range(3))
        out = attend_all(q, k, v, mask_BT).reshape(x_BTD.shape)
        return Linear((c.d_model,), ("embed", "heads"), True, c.param_dtype, name="out")(out)


class EncoderBlock(nn.Module):
    """a = norm(x + attn(x)); y = norm(a + mlp(a))."""

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

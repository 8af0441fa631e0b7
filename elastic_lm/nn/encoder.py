"""One layer of a bidirectional encoder (BERT, arXiv 1810.04805), and the head of its masked language model.

    a = norm(x + attn(x))          a = x + attn(norm(x))
    y = norm(a + mlp(a))           y = a + mlp(norm(a))      norms in front: ModernBERT, arXiv 2412.13663

Attention looks in both directions. A mask says which tokens are padding, which none of the others sees.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.rope import RopeConfig
from elastic_lm.nn.attention import AttentionContext, KeyValues, attend, seen_by_all
from elastic_lm.nn.disentangled import Distances, distance_biases
from elastic_lm.nn.linear import Linear, linear
from elastic_lm.nn.mlp import ACTIVATIONS, MLP
from elastic_lm.nn.norm import Norm
from elastic_lm.nn.partition import partitioned
from elastic_lm.nn.rope import Rotation, apply_rope, rope_frequencies


@flax.struct.dataclass
class EncoderContext:
    """What the layers know of a batch besides its states; the same for all of them.

    Attributes:
      mask: [B, T] bool, False at padding.
      biases: [N, T, T] float32 biases of distance (MPNet), or None.
      distances: what disentangled attention knows of distances (DeBERTa), or None.
      rotations: of layers that see everything, and of local ones; None without rotary positions.
    """

    mask: jax.Array
    biases: jax.Array | None = None
    distances: Distances | None = None
    rotations: tuple[Rotation, Rotation] | None = None


class EncoderBlock(nn.Module):
    """One layer.

    Attributes:
      config: the model; static.
      layer: its number, counted from 0; static.
    """

    config: EncoderConfig
    layer: int = 0

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: EncoderContext) -> jax.Array:
        """Runs the layer.

        Args:
          x_BTD: input of the layer, h_{l-1}.
          context: of the batch.

        Returns:
          [B, T, D] output of the layer, h_l.
        """
        c = self.config
        attention, mlp = EncoderAttention(c, self.layer, name="attn"), MLP(c, name="mlp")
        if c.pre_norm:
            # What enters the first layer comes from the norm of the embeddings, so that it has no own.
            normed = encoder_norm(c, "attn_norm")(x_BTD) if self.layer else x_BTD
            middle = x_BTD + attention(normed, context)
            return middle + mlp(encoder_norm(c, "mlp_norm")(middle))

        middle = encoder_norm(c, "attn_norm")(x_BTD + attention(x_BTD, context))
        return encoder_norm(c, "mlp_norm")(middle + mlp(middle))


class EncoderAttention(nn.Module):
    """Projections and attention of one layer; `qkv` is laid out as a decoder's, [N, 3, H, D]."""

    config: EncoderConfig
    layer: int = 0

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: EncoderContext) -> jax.Array:
        """Attends to the tokens that count, in a local layer to those nearby; returns [B, T, D]."""
        c, local = self.config, self.config.local(self.layer)
        axes = ("kv_heads", None, None, "embed")
        project = Linear((c.n_heads, 3, c.head_dim), axes, c.biases, c.param_dtype, name="qkv")
        qkv = project(x_BTD)
        q, k, v = (qkv[:, :, :, i] for i in range(3))

        biases = context.biases
        if context.distances is not None:
            # The vectors of distances pass the projections of queries and keys as states do.
            projected = project(context.distances.vectors)
            of_queries, of_keys = projected[:, :, 0], projected[:, :, 1]
            biases = distance_biases(q, k, of_queries, of_keys, context.distances.index) * c.query_scale
        if context.rotations is not None:
            rotation = context.rotations[local]
            q, k = apply_rope(q, rotation), apply_rope(k, rotation)

        queries, keys, window = places(context.mask, c.window // 2 if local else None)
        seen = KeyValues(jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), keys)
        here = AttentionContext(queries, window=window, biases=None if biases is None else [biases])
        out = attend(q, seen, here, scale=c.query_scale)

        out = out.reshape(x_BTD.shape)
        return Linear((c.d_model,), ("embed", "heads"), c.biases, c.param_dtype, name="out")(out)


def places(mask_BT: jax.Array, half: int | None) -> tuple[jax.Array, jax.Array, int]:
    """Positions by which attention, whose queries look back only, sees in both directions.

    Args:
      mask_BT: bool, False at padding.
      half: tokens that are seen on either side; None = all. Static.

    Returns:
      (positions of queries [B, T] int32, of keys [B, T] int32, the window).
    """
    if half is None:
        # Queries all stand at position 0, and so do the keys that they see.
        return jnp.zeros(mask_BT.shape, jnp.int32), seen_by_all(mask_BT), 0

    # A query stands `half` positions ahead of its token, and what lies behind it in the window is both sides.
    place_T = jnp.arange(mask_BT.shape[1], dtype=jnp.int32)
    keys_BT = jnp.maximum(place_T, seen_by_all(mask_BT))
    return jnp.broadcast_to(place_T + half, mask_BT.shape), keys_BT, 2 * half + 1


def rotation_of(theta: float, dim: int, place_T: jax.Array) -> Rotation:
    """The plain rotation of heads.

    Args:
      theta: base of the wavelengths; static.
      dim: width of a head; static.
      place_T: int32 positions of tokens, the same in all rows.
    """
    frequency, _ = rope_frequencies(RopeConfig(theta=theta), dim, 0)
    angle = place_T[None, :, None, None].astype(jnp.float32) * frequency
    return Rotation(jnp.cos(angle), jnp.sin(angle))


class Convolution(nn.Module):
    """norm(y + f(conv(x))): joins neighbouring embeddings to the first layer's output (DeBERTa v2 XL).

    `conv` holds the columns of the convolution one after the other in one kernel [D, K D].
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, y_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Joins input and output of the first layer.

        Args:
          x_BTD: input of the layer.
          y_BTD: its output.
          mask_BT: bool, False at padding, which counts as 0.

        Returns:
          [B, T, D].
        """
        c, side, length = self.config, self.config.conv_kernel // 2, x_BTD.shape[1]
        x_BTD = jnp.pad(jnp.where(mask_BT[..., None], x_BTD, 0), ((0, 0), (side, side), (0, 0)))
        columns = [x_BTD[:, i : i + length] for i in range(c.conv_kernel)]
        conv = Linear((c.d_model,), (None, "embed"), True, c.param_dtype, name="conv")
        joined = CONV_ACTIVATIONS[c.conv_activation](conv(jnp.concatenate(columns, axis=-1)))
        return encoder_norm(c, "norm")(y_BTD + joined)


CONV_ACTIVATIONS = {"tanh": jnp.tanh, "gelu": ACTIVATIONS["gelu"], "relu": jax.nn.relu}


class TokenHead(nn.Module):
    """norm(f(W h + b)) E^T + c: a masked language model's head over the embedding E."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array, table_VE: jax.Array) -> jax.Array:
        """Returns [B, T, V] float32 logits."""
        c = self.config
        dense = Linear((c.embed_dim,), (None, "embed"), c.biases, c.param_dtype, name="dense")
        features = encoder_norm(c, "norm")(ACTIVATIONS[c.activation](dense(hidden_BTD)))
        zeros = partitioned(nn.initializers.zeros, ("vocab",))
        bias = self.param("bias", zeros, (c.vocab_size,), c.param_dtype)
        return linear(features, table_VE, bias, dtype=jnp.float32)


class Pooler(nn.Module):
    """f(W h + b), and a norm where the model has one there: what task heads read of a pooled state.

    The parameters are those of the dense layer, and `norm` beside them.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, state_BD: jax.Array) -> jax.Array:
        """Returns [B, D]."""
        c, shape = self.config, (self.config.d_model, self.config.d_model)
        kernel = self.param(
            "kernel", partitioned(nn.initializers.normal(0.02), (None, "embed")), shape, c.param_dtype
        )
        bias = None
        if c.biases:
            zeros = partitioned(nn.initializers.zeros, (None,))
            bias = self.param("bias", zeros, (c.d_model,), c.param_dtype)

        pooled = POOLERS[c.pooler](linear(state_BD, kernel, bias))
        return encoder_norm(c, "norm")(pooled) if c.pooler_norm else pooled


POOLERS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "gelu": ACTIVATIONS["gelu"]}


def encoder_norm(c: EncoderConfig, name: str) -> Norm:
    """A layer normalisation of the model.

    Args:
      c: the model; static.
      name: key of its parameters.
    """
    return Norm("layernorm", c.norm_eps, 0.0, c.param_dtype, use_bias=c.biases, name=name)

"""RMS and layer normalisation, computed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config import NormKind
from elastic_lm.nn.partition import partitioned


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension (Zhang & Sennrich 2019, eq. 4).

    Args:
      x: [..., D] activations of any float dtype.
      scale: [D] multiplier.
      eps: added to the mean square.

    Returns:
      [..., D] in the dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last dimension (Ba et al. 2016).

    Args:
      x: [..., D] activations of any float dtype.
      scale: [D] multiplier.
      bias: [D] offset.
      eps: added to the variance.

    Returns:
      [..., D] in the dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = centred * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype)


class Norm(nn.Module):
    """Owns the scale (and bias) of one normalisation.

    Attributes:
      kind: "rmsnorm" or "layernorm".
      eps: see `rms_norm`.
      offset: added to the stored scale; 1 where checkpoints store scale - 1.
      param_dtype: dtype of the parameters.
    """

    kind: NormKind
    eps: float
    offset: float = 0.0
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = (x.shape[-1],)
        ones = partitioned(nn.initializers.constant(1.0 - self.offset), ("norm",))
        scale = self.param("scale", ones, width, self.param_dtype)
        scale = scale.astype(jnp.float32) + self.offset
        if self.kind == "rmsnorm":
            return rms_norm(x, scale, self.eps)
        zeros = partitioned(nn.initializers.zeros, ("norm",))
        bias = self.param("bias", zeros, width, self.param_dtype)
        return layer_norm(x, scale, bias, self.eps)

"""RMS and layer normalisation, computed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.model import NormKind
from elastic_lm.nn.partition import partitioned


class Norm(nn.Module):
    """Owns the scale (and bias) of one normalisation.

    Attributes:
      kind: "rmsnorm" or "layernorm".
      eps: added to the mean square or the variance.
      offset: added to the stored scale; 1 for checkpoints that store scale - 1.
      param_dtype: dtype of the parameters.
      live: channels to average over, in a model whose other channels are masked to 0; 0 = all.
      use_bias: whether a layer normalisation has biases.
    """

    kind: NormKind
    eps: float
    offset: float = 0.0
    param_dtype: str = "float32"
    live: int = 0
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = (x.shape[-1],)
        ones = partitioned(nn.initializers.constant(1.0 - self.offset), ("norm",))
        scale = self.param("scale", ones, width, self.param_dtype)
        scale = scale.astype(jnp.float32) + self.offset
        if self.kind == "rmsnorm":
            return rms_norm(x, scale, self.eps, self.live)

        zeros = partitioned(nn.initializers.zeros, ("norm",))
        bias = self.param("bias", zeros, width, self.param_dtype) if self.use_bias else jnp.float32(0)
        return layer_norm(x, scale, bias, self.eps, self.live)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, live: int = 0) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension (Zhang & Sennrich 2019, eq. 4).

    Args:
      x: [..., D] activations of any float dtype.
      scale: [D] multiplier.
      eps: added to the mean square.
      live: channels of `x` to average over, the others being 0; 0 = all. Static.

    Returns:
      [..., D] in the dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    if live:
        # The mean over all D channels is live / D of the mean over the live ones (Nemotron Elastic).
        square = square * (x.shape[-1] / live)
    inverse = jax.lax.rsqrt(square + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, live: int = 0) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last dimension (Ba et al. 2016).

    Args:
      x: [..., D] activations of any float dtype.
      scale: [D] multiplier.
      bias: [D] offset, or a scalar.
      eps: added to the variance.
      live: channels of `x` to average over, the others being 0; 0 = all. Static.

    Returns:
      [..., D] in the dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    share = x.shape[-1] / live if live else 1.0
    mean = jnp.mean(x32, axis=-1, keepdims=True) * share
    centred = x32 - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    if live:
        # Each of the D - live masked channels has added mean^2 to the sum; rounding may leave less than 0.
        variance = jnp.maximum(variance * share - jnp.square(mean) * (share - 1.0), 0.0)
    inverse = jax.lax.rsqrt(variance + eps)
    y = centred * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype)

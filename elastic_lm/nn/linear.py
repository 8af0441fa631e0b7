"""Linear maps with kernels stored as (output dims..., input), the order of Hugging Face checkpoints."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from elastic_lm.nn.partition import partitioned

# Products with few tokens are bound by reading the kernel. What XLA's CPU backend is fastest at, measured
# in a loop as decoding has it: up to ONE_BY_ONE tokens a matrix-vector product each, of which all but the
# first find the kernel in cache; up to FEW_TOKENS kernel @ x^T; above that x @ kernel^T, which transposes
# the kernel in memory before it multiplies, three times the work where tokens are few.
ONE_BY_ONE = 4
FEW_TOKENS = 128


def linear(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, dtype: DTypeLike | None = None
) -> jax.Array:
    """Applies y = x W^T + b over the last dimension of `x`.

    Args:
      x: [..., I] activations.
      kernel: [O..., I] weights with any number of output dimensions.
      bias: [O...] or None.
      dtype: dtype in which products are accumulated and returned; None = that of `x`.

    Returns:
      [..., O...] in `dtype`.
    """
    kernel = kernel.astype(x.dtype)
    tokens = math.prod(x.shape[:-1])
    if tokens > FEW_TOKENS:
        contract = (((x.ndim - 1,), (kernel.ndim - 1,)), ((), ()))
        y = jax.lax.dot_general(x, kernel, contract, preferred_element_type=dtype)
    else:
        rows = x.reshape(tokens, x.shape[-1])
        together = functools.partial(_together, dtype=dtype)
        if tokens <= ONE_BY_ONE:
            one_by_one = functools.partial(_one_by_one, dtype=dtype)
            y = jax.lax.platform_dependent(rows, kernel, cpu=one_by_one, default=together)
        else:
            y = together(rows, kernel)
        y = y.reshape(*x.shape[:-1], *kernel.shape[:-1])
    return y if bias is None else y + bias.astype(y.dtype)


# Kernels are not flattened: their output dimensions may be sharded, and merging those gathers them.
def _together(x_MI: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    contract = (((kernel.ndim - 1,), (1,)), ((), ()))
    y = jax.lax.dot_general(kernel, x_MI, contract, preferred_element_type=dtype)
    return jnp.moveaxis(y, -1, 0)


def _one_by_one(x_MI: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    contract = (((kernel.ndim - 1,), (0,)), ((), ()))
    return jnp.stack([jax.lax.dot_general(kernel, x, contract, preferred_element_type=dtype) for x in x_MI])


class Linear(nn.Module):
    """Owns the kernel [*features, input] and optional bias [*features] of a `linear` map.

    Attributes:
      features: output dimensions.
      axes: logical names of (*features, input), mapped to mesh axes by `sharding.Rules`.
      use_bias: whether a bias is added.
      param_dtype: dtype of the parameters.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = partitioned(nn.initializers.normal(0.02), self.axes)
        kernel = self.param("kernel", init, (*self.features, x.shape[-1]), self.param_dtype)
        bias = None
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, self.axes[:-1])
            bias = self.param("bias", zeros, self.features, self.param_dtype)
        return linear(x, kernel, bias)

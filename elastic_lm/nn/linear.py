"""Linear maps with kernels stored as (output dims..., input), the order of Hugging Face checkpoints."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from elastic_lm.nn.partition import partitioned

# Products with few tokens are bound by reading the kernel. What XLA's CPU backend is fastest at, measured in
# a loop as decoding has it (experiments/decode): a matrix-vector product for one token, and for each of up to
# ONE_BY_ONE tokens where all but the first find the kernel in a core's cache; up to PADDED tokens
# kernel @ x^T with x^T and the result in memory, since otherwise the transpositions are folded into the
# product, which then transposes or packs the kernel. Padding a sharded dimension of tokens communicates:
# batches of meshes are better powers of two. Above FEW_TOKENS x @ kernel^T is as fast.
ONE_BY_ONE = 3
CACHED_BYTES = 2**20  # of a kernel; a core of the machine that was measured has this much cache
LEAST, PADDED = 4, 32
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
        if 0 < tokens <= PADDED:
            on_cpu = functools.partial(_on_cpu(tokens, kernel), dtype=dtype)
            y = jax.lax.platform_dependent(rows, kernel, cpu=on_cpu, default=together)
        else:
            y = together(rows, kernel)
        y = y.reshape(*x.shape[:-1], *kernel.shape[:-1])
    return y if bias is None else y + bias.astype(y.dtype)


def _on_cpu(tokens: int, kernel: jax.Array) -> Callable[..., jax.Array]:
    cached = kernel.size * kernel.dtype.itemsize <= CACHED_BYTES
    return _one_by_one if tokens == 1 or (tokens <= ONE_BY_ONE and cached) else _padded


# Kernels are not flattened: their output dimensions may be sharded, and merging those gathers them.
def _together(x_MI: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    contract = (((kernel.ndim - 1,), (1,)), ((), ()))
    y = jax.lax.dot_general(kernel, x_MI, contract, preferred_element_type=dtype)
    return jnp.moveaxis(y, -1, 0)


def _one_by_one(x_MI: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    contract = (((kernel.ndim - 1,), (0,)), ((), ()))
    return jnp.stack([jax.lax.dot_general(kernel, x, contract, preferred_element_type=dtype) for x in x_MI])


def _padded(x_MI: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    tokens = x_MI.shape[0]
    wide = max(LEAST, 1 << (tokens - 1).bit_length())
    x_IM = jax.lax.optimization_barrier(jnp.pad(x_MI, ((0, wide - tokens), (0, 0))).T)
    contract = (((kernel.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(kernel, x_IM, contract, preferred_element_type=dtype)
    return jnp.moveaxis(jax.lax.optimization_barrier(y)[..., :tokens], -1, 0)


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

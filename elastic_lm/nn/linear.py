"""Linear maps with kernels stored (out, in), as in Hugging Face folders.

A product with few tokens, as in decoding, takes at least the time in which its kernel is read from memory.
How near it comes to that on CPU depends on how the product is written, because XLA transposes or packs the
kernel of `x @ kernel^T` first:

    tokens          on CPU                                       elsewhere
    1               kernel @ x, at the memory's bandwidth; in    kernel @ x^T
                    two halves, if XLA would use a single core
    2 .. 3          kernel @ x for each, if a core's cache       kernel @ x^T
                    holds the kernel from one to the next
    up to 32        kernel @ x^T with x^T kept in memory: half   kernel @ x^T
                    to three quarters of the time
    up to 128       kernel @ x^T                                 kernel @ x^T
    more            x @ kernel^T, which is as fast               x @ kernel^T

Measured in a loop, as decoding has it (experiments/decode).

On TPUs, fewer than 8 tokens in bfloat16 are padded to 8, the rows of a tile. XLA gives the product of a
single token to the vector unit otherwise, which by the compiler's estimate takes two to three times as long
as reading the kernel from memory; the matrix unit takes no longer than that, for one token or eight
(docs/devices.md). In float32 the vector unit keeps it: the matrix unit would round the kernel to bfloat16,
and XLA would hold all of it so, beside the kernel.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from elastic_lm.nn.int8 import Int8Kernel
from elastic_lm.nn.partition import partitioned

ONE_BY_ONE = 3  # most tokens that are a matrix-vector product each
CACHED_BYTES = 2**20  # of a kernel; a core of the machine that was measured has this much cache
ONE_CORE = 2**19  # elements of the smallest kernel whose matrix-vector product XLA divides among cores
LEAST, PADDED = 4, 32  # least width that tokens are padded to, and the most tokens that are padded
FEW_TOKENS = 128  # most tokens for which the kernel comes first
TILE = 8  # rows of a tile of a TPU


class Linear(nn.Module):
    """Owns the kernel [*features, input] and optional bias [*features] of a `linear` map.

    Attributes:
      features: output dimensions.
      axes: logical names of (*features, input), which `models.sharding.Rules` maps to mesh axes.
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


def linear(
    x: jax.Array,
    kernel: jax.Array | Int8Kernel,
    bias: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Applies y = x W^T + b over the last dimension of `x`.

    Args:
      x: [..., I] activations.
      kernel: [O..., I] weights with any number of output dimensions; in 8 bits, they are scaled afterwards.
      bias: [O...] or None.
      dtype: dtype in which products are accumulated and returned; None = that of `x`.

    Returns:
      [..., O...] in `dtype`.
    """
    if isinstance(kernel, Int8Kernel):
        y = linear(x, kernel.int8, dtype=jnp.float32) * kernel.scales
        y = y.astype(x.dtype if dtype is None else dtype)
        return y if bias is None else y + bias.astype(y.dtype)

    kernel = kernel.astype(x.dtype)
    tokens = math.prod(x.shape[:-1])
    if tokens > FEW_TOKENS:
        contract = (((x.ndim - 1,), (kernel.ndim - 1,)), ((), ()))
        y = jax.lax.dot_general(x, kernel, contract, preferred_element_type=dtype)
    else:
        x_MI = x.reshape(tokens, x.shape[-1])
        together = functools.partial(_together, dtype=dtype)
        if 0 < tokens <= PADDED:
            ways = {"cpu": functools.partial(_on_cpu(tokens, kernel), dtype=dtype)}
            if tokens < TILE and x.dtype != jnp.float32:
                ways["tpu"] = functools.partial(_on_tpu, dtype=dtype)
            y = jax.lax.platform_dependent(x_MI, kernel, default=together, **ways)
        else:
            y = together(x_MI, kernel)
        y = y.reshape(*x.shape[:-1], *kernel.shape[:-1])
    return y if bias is None else y + bias.astype(y.dtype)


def _on_cpu(tokens: int, kernel: jax.Array) -> Callable[..., jax.Array]:
    """The fastest way for few tokens."""
    cached = kernel.size * kernel.dtype.itemsize <= CACHED_BYTES
    return _one_by_one if tokens == 1 or (tokens <= ONE_BY_ONE and cached) else _padded


# These ways give [M, O...]. They do not flatten the kernel: its output dimensions may be sharded over
# devices, and merging them would gather it.


def _together(x_MI: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """kernel @ x^T as XLA likes it."""
    contract = (((kernel.ndim - 1,), (1,)), ((), ()))
    y = jax.lax.dot_general(kernel, x_MI, contract, preferred_element_type=dtype)
    return jnp.moveaxis(y, -1, 0)


def _on_tpu(x_MI: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """x @ kernel^T with a whole tile of tokens, for the matrix unit."""
    tokens = x_MI.shape[0]
    x_MI = jnp.pad(x_MI, ((0, TILE - tokens), (0, 0)))
    contract = (((1,), (kernel.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x_MI, kernel, contract, preferred_element_type=dtype)[:tokens]


def _one_by_one(x_MI: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """A matrix-vector product for every token; all but the first find the kernel in the cache."""
    return jnp.stack([_matrix_vector(kernel, x, dtype) for x in x_MI])


def _matrix_vector(kernel: jax.Array, x_I: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """kernel @ x by more than one core, if the kernel is too large for the cache of one."""
    rows, size = kernel.shape[0], kernel.size
    whole = size >= ONE_CORE or size * kernel.dtype.itemsize <= CACHED_BYTES or rows % 2
    # Halves of a kernel that is sharded over devices would have to be moved between them.
    if whole or jax.device_count() > 1:
        contract = (((kernel.ndim - 1,), (0,)), ((), ()))
        return jax.lax.dot_general(kernel, x_I, contract, preferred_element_type=dtype)

    # A batch of two products: XLA gives each of them to a core.
    halves = kernel.reshape(2, rows // 2, *kernel.shape[1:])
    contract = (((kernel.ndim,), (1,)), ((0,), (0,)))
    x_2I = jnp.broadcast_to(x_I, (2, *x_I.shape))
    y = jax.lax.dot_general(halves, x_2I, contract, preferred_element_type=dtype)
    return y.reshape(kernel.shape[:-1])


def _padded(x_MI: jax.Array, kernel: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """kernel @ x^T with tokens padded to a power of two, and x^T in memory.

    If tokens are sharded over devices, padding makes the devices communicate, so that batches on a mesh are
    better powers of two.
    """
    tokens = x_MI.shape[0]
    wide = max(LEAST, 1 << (tokens - 1).bit_length())

    # Without the barriers, XLA folds the transpositions into the product and packs the kernel again.
    x_IM = jax.lax.optimization_barrier(jnp.pad(x_MI, ((0, wide - tokens), (0, 0))).T)
    contract = (((kernel.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(kernel, x_IM, contract, preferred_element_type=dtype)
    return jnp.moveaxis(jax.lax.optimization_barrier(y)[..., :tokens], -1, 0)

"""Weights in 8 bits for decoding: a kernel as integers, with a scale per output.

    s_o = max_i |W_oi| / 127,    q_oi = round(W_oi / s_o),    y_o = s_o sum_i q_oi x_i

Activations, norms, biases, gates of exits and learned positions stay as they are. A step of decoding reads a
quarter of float32's bytes, or half of bfloat16's, where the device widens integers as it reads them; on CPUs,
XLA widens them in memory first, and gains nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require

LARGEST = 127  # symmetric: -128 is not used
QUANTISED = ("kernel", "table")  # last keys of the parameters that become integers
EXCEPT = ("gate", "positions")  # keys under which everything stays as it is


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
    """A kernel or table [*outputs, inputs] in 8 bits, which stands where the array stood.

    Attributes:
      int8: the integers, of the kernel's shape.
      scales: [*outputs] float32.
    """

    int8: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.int8.shape

    @property
    def ndim(self) -> int:
        """Of the kernel."""
        return self.int8.ndim

    @property
    def size(self) -> int:
        """Numbers of the kernel."""
        return self.int8.size

    @property
    def dtype(self) -> Any:
        """int8."""
        return self.int8.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self.int8.nbytes + self.scales.nbytes

    def __getitem__(self, index: Any) -> "Int8Kernel":
        """Part of the kernel; inputs are indexed only behind an index of every output dimension."""
        inner = isinstance(index, tuple) and len(index) == self.ndim
        return Int8Kernel(self.int8[index], self.scales[index[:-1] if inner else index])

    def astype(self, dtype: Any) -> jax.Array:
        """The numbers that the integers stand for, in a floating dtype."""
        return (self.int8.astype(jnp.float32) * self.scales[..., None]).astype(dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The same on the host."""
        wide = np.asarray(self.int8, np.float32) * np.asarray(self.scales)[..., None]
        return wide if dtype is None else wide.astype(dtype)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
        """As a dict of two arrays, so that paths look like those of other parameters."""
        named = {"int8": self.int8, "scales": self.scales}
        return tuple((jax.tree_util.DictKey(name), leaf) for name, leaf in named.items()), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple[Any, Any]) -> "Int8Kernel":
        """Inverse of `tree_flatten_with_keys`."""
        return cls(*leaves)


def is_int8(leaf: Any) -> bool:
    """Whether a parameter is in 8 bits."""
    return isinstance(leaf, Int8Kernel)


def has_int8(params: Any) -> bool:
    """Whether any parameter of a tree is."""
    return any(map(is_int8, jax.tree.leaves(params, is_leaf=is_int8)))


def becomes_int8(path: tuple[str, ...]) -> bool:
    """Whether the parameter at a path is one of those that become integers."""
    return path[-1] in QUANTISED and not set(path) & set(EXCEPT)


def to_int8(kernel: Any) -> Int8Kernel:
    """A kernel in 8 bits, on the host if it lies there.

    Args:
      kernel: [*outputs, inputs] of any floating dtype.
    """
    numbers: Any = np if isinstance(kernel, np.ndarray) else jnp
    wide = kernel.astype(numbers.float32)
    # Products with inverses, as XLA makes of quotients: hosts and devices get the same numbers.
    scales = numbers.max(numbers.abs(wide), axis=-1) * numbers.float32(1 / LARGEST)
    # Outputs of zeros alone have the scale 0, and integers 0.
    inverse = numbers.float32(1) / numbers.where(scales > 0, scales, numbers.float32(1))
    integers = numbers.clip(numbers.round(wide * inverse[..., None]), -LARGEST, LARGEST)
    return Int8Kernel(integers.astype(numbers.int8), scales.astype(numbers.float32))


def quantised(
    params: Any,
    release: Callable[[Any], None] = lambda leaf: None,
    convert: Callable[[Any], Int8Kernel] | None = None,
) -> Any:
    """A model's parameters with kernels and tables in 8 bits, made one after the other.

    Args:
      params: canonical parameters, on any devices.
      release: called with every kernel that is no longer needed.
      convert: does what `to_int8` does; None = that, compiled.

    Returns:
      The same tree, with an `Int8Kernel` in the place of every kernel.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if is_int8(leaf) or not becomes_int8(tuple(entry.key for entry in path)):
            return leaf
        small = (convert or _to_int8_on_device)(leaf)
        release(leaf)
        return small

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_int8)


_to_int8_on_device = jax.jit(to_int8)


def check_wide(what: str, params: Any) -> None:
    """`require` that no parameter is in 8 bits, where numbers would be lost for good.

    Args:
      what: is done with the parameters.
      params: any tree of them.
    """
    fix = "8 bits are for decoding, and what they round away is lost; load the model without weights='int8'"
    require(not has_int8(params), what, "int8 weights", fix)

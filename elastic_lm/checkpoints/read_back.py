"""What was written to a checkpoint is read back and compared, a few arrays at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

COMPARED = 1 << 28  # bytes that are read back at once


@dataclasses.dataclass(frozen=True)
class OnHost:
    """An array as it is now, on the host, while its own memory goes to the next step.

    Attributes:
      shape: of the whole array.
      dtype: likewise.
      parts: (place in the array, NumPy array), which cover it.
    """

    shape: tuple[int, ...]
    dtype: Any
    parts: tuple[tuple[Any, np.ndarray], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def on_host(tree: Any) -> Any:
    """The arrays of a tree as `OnHost`; they stay as they are where the tree is donated.

    orbax takes its copies from the same arrays, which keep them, so that nothing is copied twice. On a CPU
    nothing is copied at all: jax gives a step new memory as long as somebody looks at the old.
    """
    leaves, kind = jax.tree.flatten(tree)
    shards = [[shard for shard in leaf.addressable_shards if shard.replica_id == 0] for leaf in leaves]
    for shard in (shard for of_leaf in shards for shard in of_leaf):
        shard.data.copy_to_host_async()
    copies = [
        OnHost(leaf.shape, leaf.dtype, tuple((shard.index, np.asarray(shard.data)) for shard in of_leaf))
        for leaf, of_leaf in zip(leaves, shards, strict=True)
    ]
    return jax.tree.unflatten(kind, copies)


def check_same(tree: Any, read: Callable[[Any], Any]) -> None:
    """Checks that arrays read back from a checkpoint bit by bit. Several processes cannot, and do not.

    Args:
      tree: what was written, arrays or `OnHost`.
      read: from NumPy arrays of the same shapes and dtypes, whose values do not matter, to the stored ones.
        Most of the arrays are `ocp.PLACEHOLDER` each time, so that no second copy of the tree is made.

    Raises:
      ValueError: an array differs; names it.
    """
    if jax.process_count() > 1:
        return
    leaves, kind = jax.tree_util.tree_flatten_with_path(tree)
    for piece in _pieces([leaf.nbytes for _, leaf in leaves]):
        like: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
        like[piece] = [np.empty(leaf.shape, leaf.dtype) for _, leaf in leaves[piece]]
        stored = jax.tree.leaves(read(jax.tree.unflatten(kind, like)))
        for (path, leaf), found in zip(leaves[piece], stored[piece], strict=True):
            parts = leaf.parts if isinstance(leaf, OnHost) else [(..., leaf)]
            if not all(np.array_equal(_bits(part), _bits(found[place])) for place, part in parts):
                raise ValueError(f"{jax.tree_util.keystr(path)} differs")


def _pieces(sizes: list[int]) -> Iterator[slice]:
    """Runs of arrays that have at most COMPARED bytes together, or are one larger array."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > COMPARED:
            yield slice(start, i)
            start, total = i, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))


def _bits(leaf: Any) -> np.ndarray:
    """The bytes of an array, in which NaN equals itself."""
    return np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8)

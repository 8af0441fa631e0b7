"""What was written to a checkpoint is read back and compared, a few arrays at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

COMPARED = 1 << 28  # bytes that are read back at once


def check_same(tree: Any, read: Callable[[Any], Any]) -> None:
    """Checks that arrays read back from a checkpoint bit by bit. Several processes cannot, and do not.

    Args:
      tree: what was written.
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
            if not np.array_equal(_bits(leaf), _bits(found)):
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

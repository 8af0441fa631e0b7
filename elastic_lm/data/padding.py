"""Rows of token ids as one array."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Row = TypeVar("Row")


def padded(rows: Sequence[Sequence[int]], count: int, width: int, fill: int = 0) -> np.ndarray:
    """Rows filled up on the right, and below with rows of nothing else.

    Args:
      rows: at most `count` lists of at most `width` token ids.
      count: rows of the array.
      width: columns of the array.
      fill: what fills them up.

    Returns:
      [count, width] int32.
    """
    tokens = np.full((count, width), fill, np.int32)
    for row, ids in zip(tokens, rows, strict=False):
        row[: len(ids)] = ids
    return tokens


def filled(rows: Sequence[Row], size: int) -> list[Row]:
    """Rows with the first one repeated until there are `size`."""
    return [*rows, *[rows[0]] * (size - len(rows))]

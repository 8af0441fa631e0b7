"""Examples of similar length in one batch, so that batches hold little padding."""

from collections.abc import Callable
from typing import Any, TypeVar

import grain
import numpy as np

WINDOW = 16  # batches whose examples are grouped

Example = TypeVar("Example")


def batches_of_similar_size(
    stream: grain.IterDataset, batch_size: int, size: Callable[[Any], Any], seed: int
) -> grain.IterDataset:
    """Lists of examples of similar size, out of windows of `WINDOW` batches.

    Args:
      stream: endless examples, shuffled.
      batch_size: examples per list.
      size: of an example; examples of one size stay in their order.
      seed: of the order of a window's batches, which does not follow their sizes.
    """
    windows = stream.batch(WINDOW * batch_size, drop_remainder=True, batch_fn=list)
    return grain.experimental.FlatMapIterDataset(windows, _SplitWindow(batch_size, size, seed))


class _SplitWindow(grain.experimental.FlatMapTransform):
    """Splits a window of examples into batches."""

    max_fan_out = WINDOW

    def __init__(self, batch_size: int, size: Callable[[Any], Any], seed: int) -> None:
        self._batch_size, self._size = batch_size, size
        self._order = np.random.default_rng(seed).permutation(WINDOW)

    def flat_map(self, element: list[Example]) -> list[list[Example]]:
        """The batches of one window."""
        n, ordered = self._batch_size, sorted(element, key=self._size)
        return [ordered[i * n : (i + 1) * n] for i in self._order]

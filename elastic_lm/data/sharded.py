"""Text in shards, each packed by itself: what lets every process of a run read only its part.

With S shards, shard s reads the documents s, s + S, s + 2S, ... of the shuffled order, and fills the rows
s B / S to (s + 1) B / S of every batch of B rows. A row depends on the data, the seed and S alone. One
process reads all shards, and several read those whose rows their devices hold, so that the batches are the
same for every number of processes. With one shard every process reads everything and keeps its rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

KEY = "shards"  # of a position: that of each shard, by its number

Arrays = dict[str, np.ndarray]


def take_rows(rows: Sequence[int] | np.ndarray, batch: Mapping[str, np.ndarray]) -> Arrays:
    """These rows of a batch.

    Args:
      rows: their numbers.
      batch: [B, ...] arrays.
    """
    return {name: array[np.asarray(rows)] for name, array in batch.items()}


def rows_alone(data: grain.IterDataset, rows: Sequence[int] | None) -> grain.IterDataset:
    """Batches of which a process keeps some rows.

    Args:
      data: batches.
      rows: numbers of the rows that are kept; None = all.
    """
    return data if rows is None else data.map(functools.partial(take_rows, tuple(rows)))


@dataclasses.dataclass(frozen=True)
class ShardedBatches:
    """Endless batches whose rows come from several shards.

    Attributes:
      shard: makes the batches of one shard, from its number.
      count: S, shards.
      batch_size: B, rows of a whole batch, a multiple of S.
      rows: which of them this process needs, in increasing order; None = all. Other shards are not read.
    """

    shard: Callable[[int], grain.IterDataset]
    count: int
    batch_size: int
    rows: tuple[int, ...] | None = None

    def __iter__(self) -> "ShardedIterator":
        size = self.batch_size // self.count
        rows = range(self.batch_size) if self.rows is None else self.rows
        needed = sorted({row // size for row in rows})

        # Rows as they stand in what the needed shards give.
        start = {shard: i * size for i, shard in enumerate(needed)}
        kept = [start[row // size] + row % size for row in rows]
        return ShardedIterator({shard: iter(self.shard(shard)) for shard in needed}, kept)


class ShardedIterator(Iterator[Arrays]):
    """Batches from several shards; resumes as a grain iterator does, in another number of processes too."""

    def __init__(self, shards: Mapping[int, Any], kept: Sequence[int]) -> None:
        """Creates the iterator, at the beginning of its shards.

        Args:
          shards: grain iterators by the number of the shard, in increasing order.
          kept: rows of what they give together that make the batch.
        """
        self._shards = dict(shards)
        self._kept = np.asarray(kept)

    def __next__(self) -> Arrays:
        parts = [next(shard) for shard in self._shards.values()]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return take_rows(self._kept, whole)

    def get_state(self) -> dict[str, Any]:
        """Where the shards that this process reads stand, by their numbers as text.

        Those of all processes together are the position of the run, from which any number can go on.
        """
        return {KEY: {str(number): shard.get_state() for number, shard in self._shards.items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves the iterator.

        Args:
          state: the position of all shards that this process reads, and perhaps of others.

        Raises:
          ValueError: a shard is missing.
        """
        stored = state.get(KEY, {})
        missing = [number for number in self._shards if str(number) not in stored]
        if missing:
            raise ValueError(f"the position in the data lacks shards {missing}; it has {sorted(stored)}")
        for number, shard in self._shards.items():
            shard.set_state(stored[str(number)])

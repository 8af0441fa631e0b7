"""Rows that wait until there is a whole batch of their like."""

import dataclasses
from collections.abc import Hashable

from elastic_lm.cascade.answerer import Answer, Answerer, Bucketed, Record


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A row on its way through a cascade."""

    index: int  # its place in the stream
    row: Record
    began: float  # `time.perf_counter()` when it was read
    swift: Answer | None = None  # the Swift's answer, once there is one
    score: float | None = None  # that the rule read of it

    def begun(self, swift: Answer, score: float | None) -> "Waiting":
        """The same row, waiting for the Super."""
        return dataclasses.replace(self, swift=swift, score=score)


class Gathering:
    """Rows that wait for one answerer, by bucket."""

    def __init__(self, answerer: Answerer, size: int) -> None:
        """Creates an empty one.

        Args:
          answerer: says which rows are alike, where it is `Bucketed`.
          size: rows of a whole batch.
        """
        self._answerer, self._size = answerer, size
        self._waiting: dict[Hashable, list[Waiting]] = {}
        self._bucket_of: dict[int, Hashable] = {}

    def add(self, waiting: Waiting) -> list[Waiting]:
        """Takes a row in; gives its batch back where it is whole now, else nothing."""
        bucket = self._answerer.bucket(waiting.row) if isinstance(self._answerer, Bucketed) else None
        self._waiting.setdefault(bucket, []).append(waiting)
        self._bucket_of[waiting.index] = bucket
        return self._take(bucket) if len(self._waiting[bucket]) == self._size else []

    def batch_of(self, index: int) -> list[Waiting]:
        """The batch that a row waits in, as full as it is; nothing where the row does not wait here."""
        return self._take(self._bucket_of[index]) if index in self._bucket_of else []

    def _take(self, bucket: Hashable) -> list[Waiting]:
        batch = self._waiting.pop(bucket)
        for waiting in batch:
            del self._bucket_of[waiting.index]
        return batch

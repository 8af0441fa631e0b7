"""Queues records until a full batch of the same shape is ready."""

import dataclasses
from collections.abc import Hashable

from elastic_lm.cascade.answerer import Answer, Answerer, BucketedAnswerer, Record


@dataclasses.dataclass(frozen=True)
class QueuedRecord:
    """A record on its way through a cascade."""

    index: int  # its place in the stream
    record: Record
    read_at: float  # `time.perf_counter()` when it was read from the stream
    asked: tuple[Answer, ...] = ()  # answers or previews of the members that were asked, in their order
    scores: tuple[float | None, ...] = ()  # what the rule compared with their thresholds; None = it failed

    def after(self, answer: Answer, score: float | None) -> "QueuedRecord":
        """The same record with what the next member gave for it."""
        return dataclasses.replace(self, asked=(*self.asked, answer), scores=(*self.scores, score))

    def corrected(self, answer: Answer, score: float | None) -> "QueuedRecord":
        """The same record with another answer and score of the member that was asked last."""
        before = dataclasses.replace(self, asked=self.asked[:-1], scores=self.scores[:-1])
        return before.after(answer, score)

    def with_answer(self, member: int, answer: Answer) -> "QueuedRecord":
        """The same record with another answer of one of the members that were asked."""
        return dataclasses.replace(self, asked=(*self.asked[:member], answer, *self.asked[member + 1 :]))


class BatchQueue:
    """Queues records for one answerer until a full batch of the same bucket is ready."""

    def __init__(self, answerer: Answerer, batch_size: int) -> None:
        """Creates an empty queue.

        Args:
          answerer: where it is a `BucketedAnswerer`, records of one bucket share a batch; elsewhere any do.
          batch_size: records per full batch.
        """
        self._answerer, self._batch_size = answerer, batch_size
        self._batches: dict[Hashable, list[QueuedRecord]] = {}
        self._bucket_of: dict[int, Hashable] = {}

    def add(self, queued: QueuedRecord) -> list[QueuedRecord]:
        """Queues a record; returns its batch if that is full now, else an empty list."""
        answerer = self._answerer
        bucket = answerer.bucket(queued.record) if isinstance(answerer, BucketedAnswerer) else None
        self._batches.setdefault(bucket, []).append(queued)
        self._bucket_of[queued.index] = bucket
        return self._take(bucket) if len(self._batches[bucket]) == self._batch_size else []

    def take_batch_of(self, index: int) -> list[QueuedRecord]:
        """The batch that a record is queued in, full or not; an empty list if it is not queued here."""
        return self._take(self._bucket_of[index]) if index in self._bucket_of else []

    def _take(self, bucket: Hashable) -> list[QueuedRecord]:
        batch = self._batches.pop(bucket)
        for queued in batch:
            del self._bucket_of[queued.index]
        return batch

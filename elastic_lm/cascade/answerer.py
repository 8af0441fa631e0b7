"""What a cascade asks of its models, and what they answer."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

Record = Mapping[str, Any]  # fields by name; what an answerer reads of them is its own affair


@dataclasses.dataclass(frozen=True)
class Answer:
    """One model's answer to one row."""

    output: Any = None  # label, number or text
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # `calibrate.routing_scores`
    cost: float = 0.0  # FLOPs of this row, padding not counted
    seconds: float = dataclasses.field(default=0.0, compare=False)  # this row's part of its batch's time
    error: str | None = None  # why there is no output
    state: Any = dataclasses.field(default=None, compare=False, repr=False)  # what `Resumes` goes on from
    begun: Any = dataclasses.field(default=None, compare=False, repr=False)  # what `finish` goes on from
    preview: "Answer | None" = dataclasses.field(default=None, compare=False, repr=False)  # see `Previews`


class Answerer(Protocol):
    """A model, or anything else that answers rows."""

    def answer(self, rows: Sequence[Record]) -> list[Answer]:
        """Answers rows, independently of each other.

        Args:
          rows: any number of them.

        Returns:
          One answer per row, in order; a row that fails gets one with an `error`.
        """
        ...


@runtime_checkable
class Bucketed(Protocol):
    """An answerer whose rows should be batched with their like."""

    def bucket(self, row: Record) -> Hashable:
        """Rows of one bucket run as one program of one shape; None = the answerer cannot tell."""
        ...


@runtime_checkable
class Resumes(Protocol):
    """A Super that goes on from what the Swift computed instead of beginning again."""

    def resume(self, rows: Sequence[Record], begun: Sequence[Answer]) -> list[Answer]:
        """Answers rows that the Swift has begun.

        Args:
          rows: as in `answer`.
          begun: the Swift's answers to them, with their `state`.

        Returns:
          What `answer` gives, at the cost of what is left to do.
        """
        ...


@runtime_checkable
class Previews(Protocol):
    """A Swift that knows some scores of a row before it answers, so that no answer is made in vain."""

    def previews(self, score: str) -> bool:
        """Whether a score is known before."""
        ...

    def preview(self, rows: Sequence[Record]) -> list[Answer]:
        """Scores of rows.

        Args:
          rows: as in `answer`.

        Returns:
          Answers without an output, at the cost so far: `begun` is what `finish` goes on from, and `state`
          what a Super that `Resumes` does.
        """
        ...

    def finish(self, rows: Sequence[Record], begun: Sequence[Answer]) -> list[Answer]:
        """Answers rows that have been previewed.

        Args:
          rows: as in `answer`.
          begun: their previews.

        Returns:
          What `answer` gives, at the same cost, which the preview is part of.
        """
        ...


def previewing(answerer: Answerer, score: str) -> Previews | None:
    """The answerer, where it knows a score before it answers."""
    return answerer if isinstance(answerer, Previews) and answerer.previews(score) else None


def failed(error: BaseException, seconds: float = 0.0) -> Answer:
    """The answer to a row that raised."""
    return Answer(error=f"{type(error).__name__}: {error}", seconds=seconds)

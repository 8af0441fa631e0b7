"""What a cascade asks of its models, as protocols, and what they give back, an `Answer` per record."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, TypeGuard, runtime_checkable

from elastic_lm.config.checks import require
from elastic_lm.data.records import text_of

Record = Mapping[str, Any]  # fields by name, like a line of JSON; each answerer documents those that it reads


@dataclasses.dataclass(frozen=True)
class Answer:
    """One model's answer to one record.

    Example:
      ```python
      from elastic_lm.cascade import Answer, Function

      # A function may return a bare output, or an `Answer` with scores and cost.
      model = Function(lambda record: Answer(record["n"] % 2, scores={"energy": 1.5}, cost=10.0))
      (answer,) = model.answer([{"n": 7}])
      assert (answer.output, answer.scores["energy"], answer.error) == (1, 1.5, None)
      ```
    """

    output: Any = None  # label, number or text
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by name (`scores.SCORES`)
    cost: float = 0.0  # FLOPs of this record; padding is not counted
    _: dataclasses.KW_ONLY
    seconds: float = dataclasses.field(default=0.0, compare=False)  # this record's share of its batch's time
    error: str | None = None  # why there is no output
    # The next two hold arrays of a model. A cascade drops them as soon as nothing can need them.
    handover: Any = dataclasses.field(default=None, compare=False, repr=False)  # what a Super resumes from
    prepared: Any = dataclasses.field(default=None, compare=False, repr=False)  # what `finish` continues from
    preview: "Answer | None" = dataclasses.field(default=None, compare=False, repr=False)  # known earlier


class Answerer(Protocol):
    """A model, or anything else that answers records: what a cascade needs of its Swift and its Super.

    Example:
      ```python
      from elastic_lm.cascade import Answer, Cascade

      class Halves:  # no base class is needed
          def answer(self, records):
              return [Answer(r["n"] // 2, {"energy": float(r["n"] % 2 == 0)}) for r in records]

      class Exact:
          def answer(self, records):
              return [Answer(r["n"] / 2) for r in records]

      results = Cascade(Halves(), Exact(), 0.5).answer([{"n": 4}, {"n": 5}])
      assert [(r.model, r.output) for r in results] == [("swift", 2), ("super", 2.5)]
      ```
    """

    def answer(self, records: Sequence[Record], /) -> list[Answer]:
        """Answers records, independently of each other.

        Args:
          records: any number of them.

        Returns:
          One answer per record, in order. A record that fails gets an answer with an `error`.
        """
        ...


@runtime_checkable
class BucketedAnswerer(Answerer, Protocol):
    """An answerer that says which records share a program, so that a cascade can batch them together."""

    def bucket(self, record: Record, /) -> Hashable:
        """A key that is equal for records of one shape; None = the answerer cannot read the record."""
        ...


@runtime_checkable
class ResumingAnswerer(Answerer, Protocol):
    """A member that continues from what an earlier one has computed instead of starting over.

    It continues from the member right before it, where neither has an attribute `weights`, or from any
    earlier one whose `weights` are the same object, which says that both run the same layers.
    """

    def resume(self, records: Sequence[Record], swift_answers: Sequence[Answer], /) -> list[Answer]:
        """Answers records that the Swift has begun.

        Args:
          records: as in `answer`.
          swift_answers: the Swift's answers to them, each with its `handover`.

        Returns:
          What `answer` gives, at the cost of the work that was left.
        """
        ...


@runtime_checkable
class PreviewingAnswerer(Answerer, Protocol):
    """A Swift that knows some scores before it answers, so that it answers only the records that it keeps."""

    def previews(self, score: str, /) -> bool:
        """Whether this score is known before the answer."""
        ...

    def preview(self, records: Sequence[Record], /) -> list[Answer]:
        """Scores records without answering them.

        Args:
          records: as in `answer`.

        Returns:
          Answers without an output, at the cost so far. `finish` continues from their `prepared`, a
          `ResumingAnswerer` from their `handover`.
        """
        ...

    def finish(self, records: Sequence[Record], previews: Sequence[Answer], /) -> list[Answer]:
        """Answers records that have been previewed.

        Args:
          records: as in `answer`.
          previews: what `preview` gave for them.

        Returns:
          What `answer` gives, at the same cost, which includes the preview's.
        """
        ...


@runtime_checkable
class ResumingPreviewer(PreviewingAnswerer, Protocol):
    """A member between others that previews from what an earlier one has computed."""

    def resume_preview(self, records: Sequence[Record], earlier: Sequence[Answer], /) -> list[Answer]:
        """Scores records that an earlier member has begun.

        Args:
          records: as in `answer`.
          earlier: the earlier member's answers to them, each with its `handover`.

        Returns:
          What `preview` gives, at the cost of the work that was left.
        """
        ...


@runtime_checkable
class NamedAnswerer(Answerer, Protocol):
    """An answerer that `elastic-lm cascade` makes where it is named, as in `--swift Function:rules.py`.

    Its name is that of the class on the face `elastic_lm.cascade`.

    Attributes:
      reads: options of the command (fields of `PairOptions`, such as "text_field") that `from_place` takes as
        keywords; the command refuses others that no other model reads.
    """

    reads: ClassVar[tuple[str, ...]]

    @classmethod
    def from_place(cls, place: str, /, **options: Any) -> Self:
        """Makes the answerer.

        Args:
          place: what stands behind the colon, a file or a folder.
          **options: values of `reads`.

        Raises:
          OSError: there is nothing at `place`.
          ValueError: what is there cannot be used; names it.
        """
        ...


def can_preview(answerer: Answerer, score: str) -> TypeGuard[PreviewingAnswerer]:
    """Whether an answerer knows this score before it answers."""
    return isinstance(answerer, PreviewingAnswerer) and answerer.previews(score)


def failed(error: BaseException, seconds: float = 0.0) -> Answer:
    """The answer to a record that raised `error` after so many seconds."""
    return Answer(error=f"{type(error).__name__}: {error}", seconds=seconds)


def text_in(record: Record, field: str) -> str:
    """The text of a record that a model reads; numbers are written out, as in training.

    Raises:
      ValueError: the record has no such field, or no text in it; says what it has.
    """
    return text_of("the record", record, field)


def choice_texts(where: str, choices: Any) -> list[str]:
    """The choices of a record as texts; numbers are written out.

    Args:
      where: names them in messages.
      choices: what the record holds.

    Raises:
      ValueError: it is no list of at least one text or number.
    """
    is_list = isinstance(choices, Sequence) and not isinstance(choices, str) and len(choices) > 0
    require(is_list, where, choices, "must be a list of at least one text")
    return [text_of(where, {"choice": choice}, "choice") for choice in choices]

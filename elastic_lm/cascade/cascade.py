"""The cascade: a Swift model answers every record, and a Super model those that the Swift is not sure of.

    answer(x) = Swift(x) if score(x) >= t else Super(x)              (E-LANG, arXiv 2203.00748)

Records come as a stream, and results leave in its order. Both models see whole batches: records are queued by
shape until `batch_size` of them are ready, or until too many are held because of one that still waits. A
record gets the answer that its model alone would give, whatever it is batched with.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from elastic_lm.cascade.answerer import Answer, Answerer, Record, ResumingAnswerer, can_preview, failed
from elastic_lm.cascade.energy import keeps
from elastic_lm.cascade.queue import BatchQueue, QueuedRecord
from elastic_lm.cascade.results import CascadeResult, CascadeStatistics, Tally
from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.cascade.scores import PLAIN, score_of
from elastic_lm.config.cascade import BATCH_SIZE, DEFAULT_SCORE, SCORES
from elastic_lm.config.checks import require, require_at_least_1, require_choice, require_type

HELD_BATCHES = 64  # how many batches of records may be held at once


class Cascade:
    """A Swift and a Super model behind one rule.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.cascade import Answer, Function

      swift = Function(lambda record: Answer("short", {"energy": -float(len(record["text"]))}, cost=1.0))
      super_ = Function(lambda record: record["text"].upper(), cost=10.0)
      cascade = el.Cascade(swift, super_, -5.0)  # or a rule: el.CascadeRule.load("rule.json")

      run = cascade.run({"text": text} for text in ("hi", "a longer text"))
      assert [result.output for result in run] == ["short", "A LONGER TEXT"]
      assert run.statistics().share_super == 0.5
      ```
    """

    def __init__(
        self,
        swift: Answerer,
        super_: Answerer,
        rule: CascadeRule | float,
        *,
        score: str = DEFAULT_SCORE,
        batch_size: int = BATCH_SIZE,
        super_batch_size: int | None = None,
        most_held: int | None = None,
        preview: bool = True,
    ) -> None:
        """Creates a cascade; nothing runs yet.

        Args:
          swift: the small model. Its answers have the score that the rule reads. Where the first answer
            lacks it, the rule is taken to be wrong; where a later one does, the Swift failed on that record.
          super_: the large model. A `ResumingAnswerer` continues from what the Swift hands over.
          rule: from `measure_cascade` or a file; a number is a threshold of `score`.
          score: what a threshold that is a number is compared with; a rule has a score of its own.
          batch_size: records per batch of the Swift.
          super_batch_size: records per batch of the Super; None = the same.
          most_held: records that may be read but not given back yet, which bounds memory; None = 64 batches.
          preview: where the Swift previews the rule's score, it answers only the records that it keeps;
            False = it answers every record.

        Raises:
          ValueError: a number is out of range, or the rule was fitted on other energies than the Swift's.
        """
        for name, model in (("swift", swift), ("super_", super_)):
            answers = callable(getattr(model, "answer", None)) and not isinstance(model, type)
            require(answers, name, model, "must be an answerer, such as el.cascade.Generator")
        scoring = getattr(swift, "scoring", None)
        require_type("score", score, str)
        if not isinstance(rule, CascadeRule):
            require_type("rule", rule, float)
        if not isinstance(rule, CascadeRule):
            own = scoring or PLAIN
            rule = CascadeRule(float(rule), score, temperature=own.temperature, centre=own.centre)
        rule.check(scoring)
        ours = scoring is not None and type(swift).__module__.startswith("elastic_lm.")
        if ours:  # other answerers may give scores of other names
            require_choice("score", rule.score, SCORES)

        super_size = batch_size if super_batch_size is None else super_batch_size
        most_held = HELD_BATCHES * max(batch_size, super_size) if most_held is None else most_held
        sizes = {"batch_size": batch_size, "super_batch_size": super_size, "most_held": most_held}
        for name, value in sizes.items():
            require_at_least_1(name, value)

        self.swift, self.super_, self.rule = swift, super_, rule
        self.batch_size, self.super_batch_size, self.most_held = batch_size, super_size, most_held
        self.previewer = swift if preview and can_preview(swift, rule.score) else None

    def run(self, records: Iterable[Record], start: int = 0) -> "CascadeRun":
        """Answers a stream of records.

        Args:
          records: read as they are needed, at most `most_held` ahead.
          start: number of the first record.

        Returns:
          An iterator over the results, in the order of the records. Its `statistics()` tell at any time what
          the results so far have cost.
        """
        return CascadeRun(self, records, start)

    def answer(self, records: Sequence[Record]) -> list[CascadeResult]:
        """Answers records that are all there: `run` as a list."""
        return list(self.run(records))


class CascadeRun(Iterator[CascadeResult]):
    """One pass of a cascade over a stream.

    A record is queued for the Swift first. If it is kept after a preview, it is queued to be finished; if it
    is passed on, it is queued for the Super. A queue hands out a batch as soon as that is full.
    """

    def __init__(self, cascade: Cascade, records: Iterable[Record], start: int) -> None:
        self._cascade, self._rule = cascade, cascade.rule
        self._for_swift = BatchQueue(cascade.swift, cascade.batch_size)
        self._to_finish = BatchQueue(cascade.swift, cascade.batch_size)  # kept after a preview
        self._for_super = BatchQueue(cascade.super_, cascade.super_batch_size)
        self._done: dict[int, CascadeResult] = {}
        self._held = 0  # records that were read and not given back
        self._next = start  # number of the record whose result is given back next
        self._any_score = False
        self._tally = Tally()
        self._results = self._stream(enumerate(records, start))

    def __next__(self) -> CascadeResult:
        return next(self._results)

    def statistics(self) -> CascadeStatistics:
        """What the results that were given back so far have cost."""
        return self._tally.statistics()

    def _stream(self, records: Iterable[tuple[int, Record]]) -> Iterator[CascadeResult]:
        for index, record in records:
            self._held += 1
            self._ask_swift(self._for_swift.add(QueuedRecord(index, record, time.perf_counter())))
            # One record that waits for a full batch holds back all results after it.
            while self._held >= self._cascade.most_held and self._next not in self._done:
                self._run_next_early()
            yield from self._ready()

        while self._held:
            if self._next not in self._done:
                self._run_next_early()
            yield from self._ready()

    def _ready(self) -> Iterator[CascadeResult]:
        """Results whose turn it is."""
        while self._next in self._done:
            result = self._done.pop(self._next)
            self._held -= 1
            self._next += 1
            self._tally.add(result)
            yield result

    def _run_next_early(self) -> None:
        """Runs the batch that the next record is queued in, although it is not full."""
        if batch := self._for_swift.take_batch_of(self._next):
            self._ask_swift(batch)
        elif batch := self._to_finish.take_batch_of(self._next):
            self._finish_kept(batch)
        else:
            self._ask_super(self._for_super.take_batch_of(self._next))

    def _ask_swift(self, batch: list[QueuedRecord]) -> None:
        """Answers or previews a batch; records that the rule does not keep are queued for the Super."""
        previewer = self._cascade.previewer
        ask = previewer.preview if previewer else self._cascade.swift.answer
        for queued, answer in zip(batch, self._ask("swift", ask, batch), strict=True):
            answer, score = self._with_score(queued.index, answer)
            if score is None or not keeps(score, self._rule.threshold):
                # Only the Swift could use what it prepared, and it is large.
                answer = dataclasses.replace(answer, prepared=None)
                self._ask_super(self._for_super.add(queued.after_swift(answer, score)))
            elif previewer:
                self._finish_kept(self._to_finish.add(queued.after_swift(answer, score)))
            else:
                self._give_back(queued, "swift", answer, swift=answer, score=score)

    def _with_score(self, index: int, answer: Answer) -> tuple[Answer, float | None]:
        """A Swift's answer and the score that the rule reads; None = the Swift failed.

        Raises:
          ValueError: the score is missing and no answer has had it yet, so the rule asks for a wrong one.
        """
        if answer.error is not None:
            return answer, None
        try:
            score = score_of(answer.scores, self._rule.score, self._rule.seed, index)
        except (ValueError, TypeError) as error:
            if not self._any_score:
                raise
            return dataclasses.replace(answer, error=failed(error).error), None
        self._any_score = True
        return answer, score

    def _finish_kept(self, batch: list[QueuedRecord]) -> None:
        """Answers a batch that was previewed; records that the Swift fails on are queued for the Super."""
        previewer = self._cascade.previewer
        assert previewer is not None
        previews = [queued.swift for queued in batch if queued.swift]
        answers = self._ask("swift", lambda records: previewer.finish(records, previews), batch)
        for queued, answer in zip(batch, answers, strict=True):
            if answer.error is None:
                self._give_back(queued, "swift", answer, swift=answer, score=queued.score)
            else:
                self._ask_super(self._for_super.add(queued.after_swift(answer, None)))

    def _ask_super(self, batch: list[QueuedRecord]) -> None:
        """Answers a batch; where the Super fails, the Swift's answer is there to fall back on."""
        super_, swift_answers = self._cascade.super_, [q.swift for q in batch if q.swift is not None]
        if isinstance(super_, ResumingAnswerer) and all(a.handover is not None for a in swift_answers):
            answers = self._ask("super", lambda records: super_.resume(records, swift_answers), batch)
        else:
            answers = self._ask("super", super_.answer, batch)

        unanswered = [q for q, answer in zip(batch, answers, strict=True) if answer.error is not None]
        fallbacks = self._answer_previewed(unanswered)
        for queued, answer in zip(batch, answers, strict=True):
            assert queued.swift is not None
            swift = fallbacks.get(queued.index, queued.swift)
            self._give_back(queued, "super", answer, swift=swift, score=queued.score)

    def _answer_previewed(self, batch: list[QueuedRecord]) -> dict[int, Answer]:
        """The Swift's answers, by index, to records that it has only previewed; {} where it answered all.

        It starts over, since what it prepared was dropped: both passes count.
        """
        if not self._cascade.previewer:
            return {}
        previews = {q.index: q.swift for q in batch if q.swift is not None and q.swift.error is None}
        batch = [queued for queued in batch if queued.index in previews]
        answers = self._ask("swift", self._cascade.swift.answer, batch)
        return {
            queued.index: dataclasses.replace(answer, cost=answer.cost + previews[queued.index].cost)
            for queued, answer in zip(batch, answers, strict=True)
        }

    def _ask(
        self, name: str, ask: Callable[[list[Record]], list[Answer]], batch: list[QueuedRecord]
    ) -> list[Answer]:
        if not batch:
            return []
        records = [queued.record for queued in batch]
        began = time.perf_counter()
        answers = ask(records)
        self._tally.add_seconds(name, time.perf_counter() - began)

        require(
            len(answers) == len(records),
            f"{name} answers",
            len(answers),
            f"answer one per record ({len(records)}), with an error where it fails",
        )
        return answers

    def _give_back(
        self,
        queued: QueuedRecord,
        model: Literal["swift", "super"],
        answer: Answer,
        *,
        swift: Answer,
        score: float | None,
    ) -> None:
        result = CascadeResult(index=queued.index, model=model, answer=answer, swift=swift, score=score)
        self._done[queued.index] = result.finished(time.perf_counter() - queued.read_at)

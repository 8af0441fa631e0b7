"""The cascade: a Swift model answers every row, a Super model those that the Swift is not sure of.

    answer(x) = Swift(x) if score(x) >= t else Super(x)              (E-LANG, arXiv 2203.00748)

    cascade = el.Cascade(swift, super_, el.RoutingRule.load("rule.json"))
    run = cascade.run(rows)
    for result in run:
        result.output, result.model, result.score
    run.statistics().share_super

Rows come as a stream and results leave in its order. Both models see whole batches: rows wait, by bucket,
until `batch_size` of their like have come, or until too many rows are held because of them. What a row is
answered is what its model alone would answer, whatever it is batched with.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from elastic_lm.cascade.answerer import Answer, Answerer, Record, Resumes, failed, previewing
from elastic_lm.cascade.energy import keeps
from elastic_lm.cascade.queue import Gathering, Waiting
from elastic_lm.cascade.results import CascadeResult, CascadeStatistics, Tally
from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.cascade.scores import PLAIN, score_of
from elastic_lm.config.cascade import DEFAULT_SCORE
from elastic_lm.config.checks import AT_LEAST_1, require

HELD_BATCHES = 64  # batches' worth of rows that may be held at once


class Cascade:
    """A Swift and a Super model behind one rule."""

    def __init__(
        self,
        swift: Answerer,
        super_: Answerer,
        rule: CascadeRule | float,
        *,
        score: str = DEFAULT_SCORE,
        batch_size: int = 32,
        super_batch_size: int | None = None,
        most_held: int | None = None,
        preview: bool = True,
    ) -> None:
        """Creates a cascade; nothing runs yet.

        Args:
          swift: the small model. Its answers have the score that the rule reads; one that lacks it is a
            failure of the Swift, but for the first, which shows that the rule is wrong.
          super_: the large one. One that `Resumes` goes on from the Swift's state.
          rule: from `measure_cascade` or a file; a number is a threshold of `score`.
          score: what a threshold that is a number is compared with; a rule has its own.
          batch_size: rows per batch of the Swift.
          super_batch_size: rows per batch of the Super; None = the same.
          most_held: rows read and not given back yet, which bounds memory; None = 64 batches.
          preview: a Swift that `Previews` the rule's score answers the rows that it keeps alone; False = it
            answers every row.

        Raises:
          ValueError: a number is out of range, or the rule was fitted on other energies than the Swift's.
        """
        scoring = getattr(swift, "scoring", None)
        if not isinstance(rule, CascadeRule):
            own = scoring or PLAIN
            rule = CascadeRule(float(rule), score, temperature=own.temperature, centre=own.centre)
        rule.check(scoring)
        super_size = batch_size if super_batch_size is None else super_batch_size
        most_held = HELD_BATCHES * max(batch_size, super_size) if most_held is None else most_held
        sizes = {"batch_size": batch_size, "super_batch_size": super_size, "most_held": most_held}
        for name, value in sizes.items():
            require(AT_LEAST_1[0](value), name, value, AT_LEAST_1[1])
        self.swift, self.super_, self.rule = swift, super_, rule
        self.batch_size, self.super_batch_size, self.most_held = batch_size, super_size, most_held
        self.previews = previewing(swift, rule.score) if preview else None

    def run(self, rows: Iterable[Record], start: int = 0) -> "Run":
        """Routes a stream of rows.

        Args:
          rows: read as they are needed, `most_held` ahead at most.
          start: number of the first row.

        Returns:
          An iterator over the results, in the order of the rows; `statistics()` tells how it went so far.
        """
        return Run(self, rows, start)

    def answer(self, rows: Sequence[Record]) -> list[CascadeResult]:
        """`run` for rows that are all there."""
        return list(self.run(rows))


class Run(Iterator[CascadeResult]):
    """One pass of a cascade over a stream."""

    def __init__(self, cascade: Cascade, rows: Iterable[Record], start: int) -> None:
        self._cascade, self._rule = cascade, cascade.rule
        self._swift = Gathering(cascade.swift, cascade.batch_size)
        self._kept = Gathering(cascade.swift, cascade.batch_size)  # rows that were previewed
        self._super = Gathering(cascade.super_, cascade.super_batch_size)
        self._done: dict[int, CascadeResult] = {}
        self._held, self._any_score = 0, False
        self._next = start
        self._tally = Tally()
        self._results = self._stream(enumerate(rows, start))

    def __next__(self) -> CascadeResult:
        return next(self._results)

    def statistics(self) -> CascadeStatistics:
        """What the results given back so far cost, as `routing_results.CascadeStatistics`."""
        return self._tally.statistics()

    def _stream(self, rows: Iterable[tuple[int, Record]]) -> Iterator[CascadeResult]:
        for index, row in rows:
            self._held += 1
            self._ask_swift(self._swift.add(Waiting(index, row, time.perf_counter())))
            while self._held >= self._cascade.most_held and self._next not in self._done:
                self._hurry()
            yield from self._ready()
        while self._held:
            if self._next not in self._done:
                self._hurry()
            yield from self._ready()

    def _ready(self) -> Iterator[CascadeResult]:
        """Results whose turn it is."""
        while self._next in self._done:
            result = self._done.pop(self._next)
            self._held -= 1
            self._next += 1
            self._tally.add(result)
            yield result

    def _hurry(self) -> None:
        """Runs the batch that the oldest row waits for, as full as it is."""
        if batch := self._swift.batch_of(self._next):
            self._ask_swift(batch)
        elif batch := self._kept.batch_of(self._next):
            self._finish_kept(batch)
        else:
            self._ask_super(self._super.batch_of(self._next))

    def _ask_swift(self, batch: list[Waiting]) -> None:
        """Answers or previews a batch; what the rule does not keep waits for the Super."""
        previews = self._cascade.previews
        ask = previews.preview if previews else self._cascade.swift.answer
        for waiting, answer in zip(batch, self._ask("swift", ask, batch), strict=True):
            answer, score = self._scored(waiting.index, answer)
            if score is None or not keeps(score, self._rule.threshold):
                begun = dataclasses.replace(answer, begun=None)  # which is large
                self._ask_super(self._super.add(waiting.begun(begun, score)))
            elif previews:
                self._finish_kept(self._kept.add(waiting.begun(answer, score)))
            else:
                self._finish(waiting, CascadeResult(waiting.index, "swift", answer, answer, score))

    def _finish_kept(self, batch: list[Waiting]) -> None:
        """Answers a batch that was previewed; what the Swift fails on after all waits for the Super."""
        previews = self._cascade.previews
        assert previews is not None
        finish = functools.partial(previews.finish, begun=[w.swift for w in batch if w.swift])
        for waiting, answer in zip(batch, self._ask("swift", finish, batch), strict=True):
            if answer.error is None:
                self._finish(waiting, CascadeResult(waiting.index, "swift", answer, answer, waiting.score))
            else:
                self._ask_super(self._super.add(waiting.begun(answer, None)))

    def _scored(self, index: int, answer: Answer) -> tuple[Answer, float | None]:
        """A Swift's answer with the rule's score; one that lacks it failed, once others have had it.

        Raises:
          ValueError: no answer had it yet, so that it is the rule that asks for a wrong one.
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

    def _ask_super(self, batch: list[Waiting]) -> None:
        super_, begun = self._cascade.super_, [w.swift for w in batch if w.swift is not None]
        ask = super_.answer
        if isinstance(super_, Resumes) and all(answer.state is not None for answer in begun):
            ask = functools.partial(super_.resume, begun=begun)
        answers = self._ask("super", ask, batch)
        fallen_back = self._fall_back([w for w, a in zip(batch, answers, strict=True) if a.error is not None])
        for waiting, answer in zip(batch, answers, strict=True):
            assert waiting.swift is not None
            swift = fallen_back.get(waiting.index, waiting.swift)
            self._finish(waiting, CascadeResult(waiting.index, "super", answer, swift, waiting.score))

    def _fall_back(self, batch: list[Waiting]) -> dict[int, Answer]:
        """The Swift's answers to rows that it has only previewed and the Super failed on, by index."""
        if not self._cascade.previews:
            return {}
        begun = {w.index: w.swift for w in batch if w.swift is not None and w.swift.error is None}
        batch = [waiting for waiting in batch if waiting.index in begun]
        answers = self._ask("swift", self._cascade.swift.answer, batch)
        costs = [answer.cost + begun[w.index].cost for w, answer in zip(batch, answers, strict=True)]
        return {
            w.index: dataclasses.replace(answer, cost=cost)
            for w, answer, cost in zip(batch, answers, costs, strict=True)
        }

    def _ask(
        self, name: str, ask: Callable[[list[Record]], list[Answer]], batch: list[Waiting]
    ) -> list[Answer]:
        if not batch:
            return []
        rows = [waiting.row for waiting in batch]
        began = time.perf_counter()
        answers = ask(rows)
        self._tally.took(name, time.perf_counter() - began)
        fix = f"answer one per row ({len(rows)}), with an error where it fails"
        require(len(answers) == len(rows), f"{name} answers", len(answers), fix)
        return answers

    def _finish(self, waiting: Waiting, result: CascadeResult) -> None:
        self._done[waiting.index] = result.finished(time.perf_counter() - waiting.began)

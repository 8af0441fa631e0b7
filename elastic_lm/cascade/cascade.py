"""The cascade: a Swift model answers every record, and a Super model those that the Swift is not sure of.

    answer(x) = Swift(x) if score(x) >= t else Super(x)              (E-LANG, arXiv 2203.00748)

With more members m_1 .. m_k and thresholds t_1 .. t_{k-1}, the answer is that of the first member whose score
reaches its threshold, or of the last one. A member that shares weights with an earlier one continues from
what that has computed.

Records come as a stream, and results leave in its order. All members see whole batches: records are queued by
shape until `batch_size` of them are ready, or until too many are held because of one that still waits. A
record gets the answer that its model alone would give, whatever it is batched with.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from elastic_lm.cascade.answerer import (
    Answer,
    Answerer,
    Record,
    ResumingAnswerer,
    ResumingPreviewer,
    can_preview,
    failed,
)
from elastic_lm.cascade.energy import keeps
from elastic_lm.cascade.joint_rule import JointRule
from elastic_lm.cascade.queue import BatchQueue, QueuedRecord
from elastic_lm.cascade.results import CascadeResult, CascadeStatistics, Tally
from elastic_lm.cascade.rule import CascadeRule, Stage
from elastic_lm.cascade.scores import PLAIN, score_of
from elastic_lm.config.cascade import BATCH_SIZE, DEFAULT_SCORE, SCORES, member_names
from elastic_lm.config.checks import require, require_at_least_1, require_choice, require_type

HELD_BATCHES = 64  # how many batches of records may be held at once


class Cascade:
    """A Swift and a Super model behind one rule, and any number of models between them.

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

      # A third member between the two, with a threshold of its own.
      half = Function(lambda record: Answer("half", {"energy": -float(len(record["text"]))}, cost=4.0))
      cascade = el.Cascade(swift, super_, (-5.0, -20.0), between=(half,))
      results = cascade.answer([{"text": text} for text in ("hi", "a longer text", 9 * "long ")])
      assert [result.model for result in results] == ["swift", "middle", "super"]
      assert [result.cost for result in results] == [1.0, 5.0, 15.0]
      ```
    """

    def __init__(
        self,
        swift: Answerer,
        super_: Answerer,
        rule: CascadeRule | JointRule | float | Sequence[float],
        *,
        between: Sequence[Answerer] = (),
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
          super_: the large model. A `ResumingAnswerer` continues from what an earlier member hands over.
          rule: from `measure_cascade`, `measure_members` or a file; a number is a threshold of `score`, and
            numbers are those of all members but the last, in their order.
          between: members between the two, from the smallest to the largest; they have scores as the Swift.
          score: what a threshold that is a number is compared with; a rule has scores of its own.
          batch_size: records per batch of all members but the Super.
          super_batch_size: records per batch of the Super; None = the same.
          most_held: records that may be read but not given back yet, which bounds memory; None = 64 batches.
          preview: where a member previews the rule's score, it answers only the records that it keeps;
            False = it answers every record.

        Raises:
          ValueError: a number is out of range, the rule has thresholds for another number of members, or it
            was fitted on other energies than a member's.
        """
        members = (swift, *between, super_)
        self.names = member_names(len(members))
        for name, model in zip(("swift", *("between" for _ in between), "super_"), members, strict=True):
            answers = callable(getattr(model, "answer", None)) and not isinstance(model, type)
            require(answers, name, model, "must be an answerer, such as el.cascade.Generator")
        require_type("score", score, str)
        rule = _as_rule(rule, members[:-1], score)
        stages = rule.stages
        fix = f"give one for each of the {len(members) - 1} members before the last"
        require(len(stages) == len(members) - 1, "rule: thresholds", len(stages), fix)
        for name, member, stage in zip(self.names, members, stages, strict=False):
            scoring = getattr(member, "scoring", None)
            stage.check(scoring, name)
            ours = scoring is not None and type(member).__module__.startswith("elastic_lm.")
            if ours:  # other answerers may give scores of other names
                require_choice("score", stage.score, SCORES)

        super_size = batch_size if super_batch_size is None else super_batch_size
        most_held = HELD_BATCHES * max(batch_size, super_size) if most_held is None else most_held
        sizes = {"batch_size": batch_size, "super_batch_size": super_size, "most_held": most_held}
        for name, value in sizes.items():
            require_at_least_1(name, value)

        self.swift, self.super_, self.rule = swift, super_, rule
        self.members, self.stages = members, stages
        self.batch_size, self.super_batch_size, self.most_held = batch_size, super_size, most_held
        self.previewers = tuple(
            member if preview and can_preview(member, stage.score) else None
            for member, stage in zip(members, stages, strict=False)
        )
        self.sources = tuple(_sources(members, i) for i in range(len(members)))

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


def _as_rule(
    rule: CascadeRule | JointRule | float | Sequence[float], members: Sequence[Answerer], score: str
) -> CascadeRule | JointRule:
    """A rule, made of thresholds where numbers were given; members are those that may keep a record."""
    if isinstance(rule, CascadeRule | JointRule):
        return rule
    numbers = list(rule) if isinstance(rule, Sequence) and not isinstance(rule, str) else [rule]
    for number in numbers:
        require_type("rule", number, float)
    scorings = [getattr(member, "scoring", None) or PLAIN for member in members]
    if isinstance(rule, Sequence):
        fix = f"give one for each of the {len(members)} members before the last"
        require(len(numbers) == len(members), "rule: thresholds", len(numbers), fix)
        return JointRule(
            tuple(
                Stage(float(number), score, temperature=own.temperature, centre=own.centre)
                for number, own in zip(numbers, scorings, strict=True)
            )
        )
    return CascadeRule(float(rule), score, temperature=scorings[0].temperature, centre=scorings[0].centre)


def _sources(members: Sequence[Answerer], index: int) -> tuple[int, ...]:
    """Numbers of the members whose handover this one can continue from, the nearest first.

    Members that say which weights they run (`weights`) continue from any earlier one that runs the same; of
    those that say nothing, one continues from the member right before it.
    """
    member = members[index]
    if not isinstance(member, ResumingAnswerer):
        return ()
    own, found = getattr(member, "weights", None), []
    for i in reversed(range(index)):
        theirs = getattr(members[i], "weights", None)
        if theirs is own and (own is not None or i == index - 1):
            found.append(i)
    return tuple(found)


class CascadeRun(Iterator[CascadeResult]):
    """One pass of a cascade over a stream.

    A record is queued for the Swift first. If a member keeps it after a preview, it is queued to be finished;
    if it is passed on, it is queued for the next member. A queue hands out a batch as soon as that is full.
    """

    def __init__(self, cascade: Cascade, records: Iterable[Record], start: int) -> None:
        self._cascade, self._rule = cascade, cascade.rule
        self._last = len(cascade.members) - 1
        sizes = [cascade.batch_size] * self._last + [cascade.super_batch_size]
        self._queues = [BatchQueue(m, size) for m, size in zip(cascade.members, sizes, strict=True)]
        # Kept after a preview.
        self._to_finish = [BatchQueue(m, cascade.batch_size) for m in cascade.members[:-1]]
        self._done: dict[int, CascadeResult] = {}
        self._held = 0  # records that were read and not given back
        self._next = start  # number of the record whose result is given back next
        self._any_score = [False] * self._last  # whether an answer of a member has had its score
        self._tally = Tally(cascade.names)
        self._results = self._stream(enumerate(records, start))

    def __next__(self) -> CascadeResult:
        return next(self._results)

    def statistics(self) -> CascadeStatistics:
        """What the results that were given back so far have cost."""
        return self._tally.statistics()

    def _stream(self, records: Iterable[tuple[int, Record]]) -> Iterator[CascadeResult]:
        for index, record in records:
            self._held += 1
            self._add(0, QueuedRecord(index, record, time.perf_counter()))
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
        for i, queue in enumerate(self._queues):
            if batch := queue.take_batch_of(self._next):
                self._ask(i, batch)
                return
            if i < self._last and (batch := self._to_finish[i].take_batch_of(self._next)):
                self._finish_kept(i, batch)
                return

    def _add(self, member: int, queued: QueuedRecord) -> None:
        """Queues a record for a member, which is asked if its batch is full now."""
        self._ask(member, self._queues[member].add(queued))

    def _ask(self, member: int, batch: list[QueuedRecord]) -> None:
        """Answers or previews a batch; records that the rule does not keep are queued for the next member."""
        if member == self._last:
            self._ask_super(batch)
            return
        previewer, stage = self._cascade.previewers[member], self._cascade.stages[member]
        for queued, answer in zip(batch, self._call(member, self._way(member, batch), batch), strict=True):
            answer, score = self._with_score(member, queued.index, answer)
            if score is None or not keeps(score, stage.threshold):
                # Only this member could use what it prepared, and it is large.
                answer = dataclasses.replace(answer, prepared=None)
                self._add(member + 1, self._let_go(member, queued.after(answer, score)))
            elif previewer:
                self._finish_kept(member, self._to_finish[member].add(queued.after(answer, score)))
            else:
                self._give_back(member, queued.after(answer, score))

    def _way(self, member: int, batch: list[QueuedRecord]) -> Callable[[list[Record]], list[Answer]]:
        """How a member is asked about a batch: from what an earlier one handed over, where it can."""
        model = self._cascade.members[member]
        previewer = self._cascade.previewers[member] if member < self._last else None
        for source in self._cascade.sources[member]:
            earlier = [queued.asked[source] for queued in batch]
            if any(answer.handover is None for answer in earlier):
                continue
            if isinstance(previewer, ResumingPreviewer):
                return lambda records: previewer.resume_preview(records, earlier)
            if previewer is None and isinstance(model, ResumingAnswerer):
                return lambda records: model.resume(records, earlier)
        return previewer.preview if previewer else model.answer

    def _let_go(self, member: int, queued: QueuedRecord) -> QueuedRecord:
        """Drops what earlier members handed over where this one has handed over more of the same model."""
        weights = [getattr(model, "weights", None) for model in self._cascade.members]
        if queued.asked[member].handover is not None and weights[member] is not None:
            for i, answer in enumerate(queued.asked[:member]):
                if weights[i] is weights[member] and answer.handover is not None:
                    queued = queued.with_answer(i, dataclasses.replace(answer, handover=None))
        return queued

    def _with_score(self, member: int, index: int, answer: Answer) -> tuple[Answer, float | None]:
        """A member's answer and the score that the rule reads; None = the member failed.

        Raises:
          ValueError: the score is missing and no answer has had it yet, so the rule asks for a wrong one.
        """
        if answer.error is not None:
            return answer, None
        name, model = self._cascade.stages[member].score, self._cascade.names[member]
        try:
            # Members must not draw the same random numbers: those that one passes on are low.
            score = score_of(answer.scores, name, self._rule.seed + member, index, model)
        except (ValueError, TypeError) as error:
            if not self._any_score[member]:
                raise
            return dataclasses.replace(answer, error=failed(error).error), None
        self._any_score[member] = True
        return answer, score

    def _finish_kept(self, member: int, batch: list[QueuedRecord]) -> None:
        """Answers a batch that was previewed; records that the member fails on are queued for the next."""
        previewer = self._cascade.previewers[member]
        assert previewer is not None
        previews = [queued.asked[member] for queued in batch]
        answers = self._call(member, lambda records: previewer.finish(records, previews), batch)
        for queued, answer in zip(batch, answers, strict=True):
            if answer.error is None:
                self._give_back(member, queued.corrected(answer, queued.scores[member]))
            else:
                self._add(member + 1, queued.corrected(answer, None))

    def _ask_super(self, batch: list[QueuedRecord]) -> None:
        """Answers a batch; where the Super fails, an earlier member's answer is there to fall back on."""
        answers = self._call(self._last, self._way(self._last, batch), batch)
        unanswered = [q for q, answer in zip(batch, answers, strict=True) if answer.error is not None]
        fallbacks = self._answer_previewed(unanswered)
        for queued, answer in zip(batch, answers, strict=True):
            queued = fallbacks.get(queued.index, queued)
            self._give_back(self._last, dataclasses.replace(queued, asked=(*queued.asked, answer)))

    def _answer_previewed(self, batch: list[QueuedRecord]) -> dict[int, QueuedRecord]:
        """Records, by index, with an answer in place of the preview of the largest member that gives one.

        It starts over, since what it prepared was dropped: both passes count.
        """
        found: dict[int, QueuedRecord] = {}
        for member in reversed(range(self._last)):
            previewed = [queued for queued in batch if queued.asked[member].error is None]
            batch = [queued for queued in batch if queued.asked[member].error is not None]
            if not self._cascade.previewers[member]:
                continue  # these have its answer already
            answers = self._call(member, self._cascade.members[member].answer, previewed)
            for queued, answer in zip(previewed, answers, strict=True):
                cost = answer.cost + queued.asked[member].cost
                again = queued.with_answer(member, dataclasses.replace(answer, cost=cost))
                found[queued.index] = again
                if answer.error is not None:
                    batch.append(again)
        return found

    def _call(
        self, member: int, ask: Callable[[list[Record]], list[Answer]], batch: list[QueuedRecord]
    ) -> list[Answer]:
        if not batch:
            return []
        records = [queued.record for queued in batch]
        began = time.perf_counter()
        answers = ask(records)
        self._tally.add_seconds(member, time.perf_counter() - began)

        require(
            len(answers) == len(records),
            f"{self._cascade.names[member]} answers",
            len(answers),
            f"answer one per record ({len(records)}), with an error where it fails",
        )
        return answers

    def _give_back(self, member: int, queued: QueuedRecord) -> None:
        """Keeps the result of a record whose last answer is this member's."""
        result = CascadeResult(
            index=queued.index,
            model=self._cascade.names[member],
            answer=queued.asked[-1],
            swift=queued.asked[0],
            score=queued.scores[-1],
            between=queued.asked[1:-1],
            scores=queued.scores,
        )
        self._done[queued.index] = result.finished(time.perf_counter() - queued.read_at)

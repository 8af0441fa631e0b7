"""What a cascade gives back: one result per record, and what they cost together."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from elastic_lm.cascade.answerer import Answer
from elastic_lm.config.cascade import SUPER, SWIFT

LATENCY_SAMPLES = 4096  # latencies that are remembered, a random sample of all


@dataclasses.dataclass(frozen=True)
class CascadeResult:
    """The answer to a record, and which model gave it.

    Of two models they are called "swift" and "super", of three "swift", "middle" and "super", and of more
    "swift", "middle_1", "middle_2" and so on, and "super".

    Example:
      ```python
      from elastic_lm.cascade import Answer, Cascade, Function

      swift = Function(lambda record: Answer("cheap", {"energy": record["sure"]}, cost=1.0))
      super_ = Function(lambda record: "good", cost=10.0)
      kept, passed_on = Cascade(swift, super_, 0.5).answer([{"sure": 0.9}, {"sure": 0.1}])
      assert (kept.model, kept.output, kept.cost) == ("swift", "cheap", 1.0)
      assert (passed_on.model, passed_on.output, passed_on.cost) == ("super", "good", 11.0)
      ```
    """

    index: int  # number of the record
    model: str  # name of the one that was chosen
    answer: Answer  # exactly what the chosen model alone gives
    swift: Answer  # the Swift's answer; of a record that was passed on, its preview where there is one
    score: float | None  # what the rule compared with its last threshold; None = that model failed
    latency: float = dataclasses.field(default=0.0, compare=False)  # seconds from reading to answering
    between: tuple[Answer, ...] = ()  # of members between the Swift and the chosen one, in their order
    scores: tuple[float | None, ...] = ()  # of all members that the rule was asked about

    @property
    def output(self) -> Any:
        """The chosen model's output; None where it failed."""
        return self.answer.output

    @property
    def error(self) -> str | None:
        """Why the chosen model gave no output."""
        return self.answer.error

    @property
    def answers(self) -> tuple[Answer, ...]:
        """What every member gave that was asked, in their order; the last one is `answer`."""
        return (self.answer,) if self.model == SWIFT else (self.swift, *self.between, self.answer)

    @property
    def fallback(self) -> Any:
        """Where the Super failed, the output of the largest member before it that has one; None elsewhere."""
        return None if self.fallback_member is None else self.answers[self.fallback_member].output

    @property
    def fallback_member(self) -> int | None:
        """Number of the member whose output is the fallback; None = there is no fallback."""
        if self.error is None:
            return None
        good = [i for i, answer in enumerate(self.answers[:-1]) if answer.error is None]
        return good[-1] if good else None

    @property
    def cost(self) -> float:
        """FLOPs of everything that ran for this record."""
        return sum(answer.cost for answer in self.answers)

    def finished(self, latency: float) -> "CascadeResult":
        """The same result with its latency, without the arrays that the models kept for each other."""
        answer, swift, *between = (
            dataclasses.replace(answer, handover=None, prepared=None)
            for answer in (self.answer, self.swift, *self.between)
        )
        return dataclasses.replace(self, answer=answer, swift=swift, between=tuple(between), latency=latency)


@dataclasses.dataclass(frozen=True)
class MemberStatistics:
    """What one member of a cascade has cost so far.

    Example:
      ```python
      from elastic_lm.cascade import Answer, Cascade, Function

      swift = Function(lambda record: Answer(0, {"energy": record["n"] / 10}, cost=1.0))
      run = Cascade(swift, Function(lambda record: 1, cost=10.0), 0.5).run({"n": n} for n in range(10))
      list(run)
      small, large = run.statistics().members
      assert (small.asked, small.answered, large.asked, large.cost) == (10, 5, 5, 50.0)
      ```
    """

    name: str  # as in `CascadeResult.model`
    asked: int  # records that it was asked about
    answered: int  # records that got its answer, or that it failed on as the last one
    failed: int  # records that it failed on
    cost: float  # FLOPs
    seconds: float  # wall-clock time in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadeStatistics:
    """What a pass of a cascade has cost so far.

    Example:
      ```python
      from elastic_lm.cascade import Answer, Cascade, Function

      swift = Function(lambda record: Answer(0, {"energy": record["n"] / 10}, cost=1.0))
      run = Cascade(swift, Function(lambda record: 1, cost=10.0), 0.5).run({"n": n} for n in range(10))
      results = list(run)
      statistics = run.statistics()
      assert (statistics.records, statistics.share_super, statistics.mean_cost) == (10, 0.5, 6.0)
      print(statistics.text())
      ```
    """

    records: int  # given back
    to_super: int  # how many of them were passed on to the Super
    failed: int  # how many of them have no output
    swift_failed: int  # how many were passed on because the Swift failed
    cost: float  # FLOPs of all records
    swift_cost: float  # FLOPs of the Swift
    super_cost: float  # FLOPs of the Super
    seconds: float  # wall-clock time since the pass began
    swift_seconds: float  # part of it in the Swift
    super_seconds: float  # part of it in the Super
    latency_p50: float  # median seconds from reading a record to its answer, with the wait for its batch
    latency_p95: float  # 95th percentile of the same
    members: tuple[MemberStatistics, ...] = ()  # the same of every member, in their order

    @property
    def share_super(self) -> float:
        """Share of the records that were passed on to the Super."""
        return self.to_super / max(self.records, 1)

    @property
    def mean_cost(self) -> float:
        """FLOPs per record."""
        return self.cost / max(self.records, 1)

    def text(self) -> str:
        """Two lines for people, and a line per member where there are more than two."""
        first = (
            f"{self.records} records in {self.seconds:.1f} s: {self.to_super} to the Super "
            f"({self.share_super:.2%}), {self.failed} failed\n"
        )
        last = (
            f"per record {self.mean_cost:.3g} FLOPs, "
            f"latency p50 {1e3 * self.latency_p50:.1f} ms, p95 {1e3 * self.latency_p95:.1f} ms"
        )
        if len(self.members) > 2:
            lines = (
                f"{m.name}: asked about {m.asked}, answered {m.answered} "
                f"({m.answered / max(self.records, 1):.2%}), {m.seconds:.1f} s, {m.cost:.3g} FLOPs\n"
                for m in self.members
            )
            return first + "".join(lines) + last
        return first + (
            f"Swift {self.swift_seconds:.1f} s, {self.swift_cost:.3g} FLOPs; "
            f"Super {self.super_seconds:.1f} s, {self.super_cost:.3g} FLOPs; {last}"
        )


class Tally:
    """Sums over results; its size does not grow with their number."""

    def __init__(self, names: Sequence[str] = (SWIFT, SUPER)) -> None:
        """Creates empty sums.

        Args:
          names: of the members, in their order.
        """
        self._began = time.perf_counter()
        self._records = self._failed = 0
        self._names, n = tuple(names), len(names)
        self._asked, self._answered, self._member_failed = [0] * n, [0] * n, [0] * n
        self._cost, self._seconds = [0.0] * n, [0.0] * n
        self._latencies: list[float] = []
        self._draw = np.random.default_rng(0)

    def add_seconds(self, member: int, seconds: float) -> None:
        """Counts time that a member took, by its number."""
        self._seconds[member] += seconds

    def add(self, result: CascadeResult) -> None:
        """Counts a result."""
        self._records += 1
        self._failed += result.error is not None
        self._answered[self._names.index(result.model)] += 1
        for i, answer in enumerate(result.answers):
            self._asked[i] += 1
            self._member_failed[i] += answer.error is not None
            self._cost[i] += answer.cost
        self._remember(result.latency)

    def _remember(self, latency: float) -> None:
        """Reservoir sampling: after n results each has been kept with probability LATENCY_SAMPLES / n."""
        if len(self._latencies) < LATENCY_SAMPLES:
            self._latencies.append(latency)
        elif (place := int(self._draw.integers(self._records))) < LATENCY_SAMPLES:
            self._latencies[place] = latency

    def statistics(self) -> CascadeStatistics:
        """The sums so far."""
        p50, p95 = np.percentile(self._latencies or [0.0], [50, 95]).tolist()
        columns = (self._names, self._asked, self._answered, self._member_failed, self._cost, self._seconds)
        return CascadeStatistics(
            records=self._records,
            to_super=self._answered[-1],
            failed=self._failed,
            swift_failed=self._member_failed[0],
            cost=sum(self._cost),
            swift_cost=self._cost[0],
            super_cost=self._cost[-1],
            seconds=time.perf_counter() - self._began,
            swift_seconds=self._seconds[0],
            super_seconds=self._seconds[-1],
            latency_p50=p50,
            latency_p95=p95,
            members=tuple(MemberStatistics(*values) for values in zip(*columns, strict=True)),
        )

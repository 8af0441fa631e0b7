"""What a cascade gives back: one result per record, and what they cost together."""

import dataclasses
import time
from typing import Any, Literal

import numpy as np

from elastic_lm.cascade.answerer import Answer

LATENCY_SAMPLES = 4096  # latencies that are remembered, a random sample of all


@dataclasses.dataclass(frozen=True)
class CascadeResult:
    """The answer to a record, and which model gave it.

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
    model: Literal["swift", "super"]  # which one was chosen
    answer: Answer  # exactly what the chosen model alone gives
    swift: Answer  # the Swift's answer; of a record that was passed on, its preview where there is one
    score: float | None  # what the rule compared with its threshold; None = the Swift failed
    latency: float = dataclasses.field(default=0.0, compare=False)  # seconds from reading to answering

    @property
    def output(self) -> Any:
        """The chosen model's output; None where it failed."""
        return self.answer.output

    @property
    def error(self) -> str | None:
        """Why the chosen model gave no output."""
        return self.answer.error

    @property
    def fallback(self) -> Any:
        """The Swift's output where the Super failed; None elsewhere."""
        return self.swift.output if self.error is not None and self.swift.error is None else None

    @property
    def cost(self) -> float:
        """FLOPs of everything that ran for this record."""
        return self.swift.cost + (self.answer.cost if self.model == "super" else 0.0)

    def finished(self, latency: float) -> "CascadeResult":
        """The same result with its latency, without the arrays that the models kept for each other."""
        answer, swift = (
            dataclasses.replace(answer, handover=None, prepared=None) for answer in (self.answer, self.swift)
        )
        return dataclasses.replace(self, answer=answer, swift=swift, latency=latency)


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

    @property
    def share_super(self) -> float:
        """Share of the records that were passed on to the Super."""
        return self.to_super / max(self.records, 1)

    @property
    def mean_cost(self) -> float:
        """FLOPs per record."""
        return self.cost / max(self.records, 1)

    def text(self) -> str:
        """Two lines for people."""
        return (
            f"{self.records} records in {self.seconds:.1f} s: {self.to_super} to the Super "
            f"({self.share_super:.2%}), {self.failed} failed\n"
            f"Swift {self.swift_seconds:.1f} s, {self.swift_cost:.3g} FLOPs; "
            f"Super {self.super_seconds:.1f} s, {self.super_cost:.3g} FLOPs; "
            f"per record {self.mean_cost:.3g} FLOPs, "
            f"latency p50 {1e3 * self.latency_p50:.1f} ms, p95 {1e3 * self.latency_p95:.1f} ms"
        )


class Tally:
    """Sums over results; its size does not grow with their number."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._records = self._to_super = self._failed = self._swift_failed = 0
        self._cost = {"swift": 0.0, "super": 0.0}
        self._seconds = {"swift": 0.0, "super": 0.0}
        self._latencies: list[float] = []
        self._draw = np.random.default_rng(0)

    def add_seconds(self, model: str, seconds: float) -> None:
        """Counts time that a model ("swift" or "super") took."""
        self._seconds[model] += seconds

    def add(self, result: CascadeResult) -> None:
        """Counts a result."""
        self._records += 1
        self._to_super += result.model == "super"
        self._failed += result.error is not None
        self._swift_failed += result.swift.error is not None
        self._cost["swift"] += result.swift.cost
        self._cost["super"] += result.answer.cost if result.model == "super" else 0.0
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
        return CascadeStatistics(
            records=self._records,
            to_super=self._to_super,
            failed=self._failed,
            swift_failed=self._swift_failed,
            cost=sum(self._cost.values()),
            swift_cost=self._cost["swift"],
            super_cost=self._cost["super"],
            seconds=time.perf_counter() - self._began,
            swift_seconds=self._seconds["swift"],
            super_seconds=self._seconds["super"],
            latency_p50=p50,
            latency_p95=p95,
        )

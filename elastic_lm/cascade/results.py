"""What a cascade gives back: one result per row, and what they cost together."""

import dataclasses
import time
from typing import Any, Literal

import numpy as np

from elastic_lm.cascade.answerer import Answer

REMEMBERED = 4096  # latencies, a random sample of all


@dataclasses.dataclass(frozen=True)
class CascadeResult:
    """A row's answer and who gave it."""

    index: int  # number of the row
    model: Literal["swift", "super"]  # who was chosen
    answer: Answer  # exactly what the chosen model alone gives
    swift: Answer  # the Swift's, or what it previewed (`answerers.Previews`) of a row that the Super has
    score: float | None  # of the Swift's answer, that the rule read; None = the Swift failed
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
        """FLOPs of all that ran for this row."""
        return self.swift.cost + (self.answer.cost if self.model == "super" else 0.0)

    def finished(self, latency: float) -> "CascadeResult":
        """The same without the states that models hand on, which are large."""
        answer, swift = (dataclasses.replace(a, state=None, begun=None) for a in (self.answer, self.swift))
        return dataclasses.replace(self, answer=answer, swift=swift, latency=latency)


@dataclasses.dataclass(frozen=True)
class CascadeStatistics:
    """What a pass of a cascade cost."""

    rows: int  # given back
    to_super: int  # of these, sent to the Super
    failed: int  # of these, without an output
    swift_failed: int  # sent to the Super because the Swift failed
    cost: float  # FLOPs of all rows
    swift_cost: float  # FLOPs of the Swift
    super_cost: float  # FLOPs of the Super
    seconds: float  # wall-clock time since the pass was begun
    swift_seconds: float  # of them in the Swift
    super_seconds: float  # of them in the Super
    latency_p50: float  # seconds from reading a row to its answer, waiting for its batch included
    latency_p95: float  # likewise

    @property
    def share_super(self) -> float:
        """Share of the rows that went to the Super."""
        return self.to_super / max(self.rows, 1)

    @property
    def mean_cost(self) -> float:
        """FLOPs per row."""
        return self.cost / max(self.rows, 1)

    def text(self) -> str:
        """Two lines for people."""
        return (
            f"{self.rows} rows in {self.seconds:.1f} s: {self.to_super} to the Super "
            f"({self.share_super:.2%}), {self.failed} failed\n"
            f"Swift {self.swift_seconds:.1f} s, {self.swift_cost:.3g} FLOPs; "
            f"Super {self.super_seconds:.1f} s, {self.super_cost:.3g} FLOPs; "
            f"per row {self.mean_cost:.3g} FLOPs, "
            f"latency p50 {1e3 * self.latency_p50:.1f} ms, p95 {1e3 * self.latency_p95:.1f} ms"
        )


class Tally:
    """Sums over results; its size does not grow with their number."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._rows = self._to_super = self._failed = self._swift_failed = 0
        self._cost = {"swift": 0.0, "super": 0.0}
        self._seconds = {"swift": 0.0, "super": 0.0}
        self._latencies: list[float] = []
        self._draw = np.random.default_rng(0)

    def took(self, model: str, seconds: float) -> None:
        """Counts time that a model ("swift" or "super") took."""
        self._seconds[model] += seconds

    def add(self, result: CascadeResult) -> None:
        """Counts a result."""
        self._rows += 1
        self._to_super += result.model == "super"
        self._failed += result.error is not None
        self._swift_failed += result.swift.error is not None
        self._cost["swift"] += result.swift.cost
        self._cost["super"] += result.answer.cost if result.model == "super" else 0.0
        if len(self._latencies) < REMEMBERED:
            self._latencies.append(result.latency)
        elif (place := int(self._draw.integers(self._rows))) < REMEMBERED:
            self._latencies[place] = result.latency

    def statistics(self) -> CascadeStatistics:
        """The sums so far."""
        p50, p95 = np.percentile(self._latencies or [0.0], [50, 95]).tolist()
        return CascadeStatistics(
            rows=self._rows,
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

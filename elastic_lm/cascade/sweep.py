"""Thresholds between a Swift and a Super model, swept on validation rows.

With the Swift's scores s_i, the qualities a_i of its answers and b_i of the Super's, and the costs c_i and
C_i of both, a threshold t gives

    share(t) = mean [s_i < t]                                    rows that go to the Super
    accuracy(t) = mean (a_i if s_i >= t else b_i)
    cost(t) = mean (c_i + [s_i < t] C_i)

which change at the scores alone: thresholds between two neighbouring scores, and below and above all of
them, are every choice there is. Where a Swift knows its scores before it answers, c_i ends there, and what
is left to do, k_i, is added where s_i >= t. E-LANG takes the cheapest that reaches the Super's accuracy, or
the one that is most accurate (arXiv 2203.00748). These are averages over the rows that chose the threshold;
`routing_risk` states what holds for new rows.
"""

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np

from elastic_lm.cascade.energy import keeps
from elastic_lm.config.checks import require

ALWAYS_SUPER = sys.float_info.max  # a threshold that no score reaches
ALWAYS_SWIFT = -sys.float_info.max  # one that every score reaches
TOLERANCE = 1e-12  # of sums of accuracies

PerRecord = Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class CascadePoint:
    """What a threshold gives on average."""

    threshold: float  # the Swift keeps rows with a score of at least this
    share_super: float  # share of the rows that go to the Super
    accuracy: float  # mean quality of the answers, in [0, 1]
    cost: float  # mean cost of a row, in the unit of the costs that were given


@dataclasses.dataclass(frozen=True, eq=False)
class CascadeCurve:
    """Every threshold that routes the measured rows differently, from the Swift alone to the Super alone."""

    threshold: np.ndarray  # [K] float64, increasing
    share_super: np.ndarray  # [K] float64, increasing
    accuracy: np.ndarray  # [K] float64
    cost: np.ndarray  # [K] float64, mean per row
    swift_accuracy: float
    super_accuracy: float
    rows: int

    def __len__(self) -> int:
        return len(self.threshold)

    def point(self, index: int) -> CascadePoint:
        """One threshold and what it gives."""
        columns = (self.threshold, self.share_super, self.accuracy, self.cost)
        return CascadePoint(*(float(column[index]) for column in columns))

    def points(self, most: int = 101) -> tuple[CascadePoint, ...]:
        """At most `most` thresholds, spread evenly, the first and the last among them."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).round().astype(int))
        return tuple(self.point(i) for i in chosen)


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """Validation rows that both models answered.

    Attributes:
      scores: [N] float64 of the Swift, higher = surer; NaN goes to the Super.
      swift: [N] float64 quality of the Swift's answers, in [0, 1] (1 = correct).
      super_: [N] float64 of the Super's.
      cost_swift: [N] float64, FLOPs or seconds, until the score is known.
      cost_super: [N] float64, in the same unit.
      cost_kept: [N] float64, likewise, of what the Swift does after its score is known.
    """

    scores: np.ndarray
    swift: np.ndarray
    super_: np.ndarray
    cost_swift: np.ndarray
    cost_super: np.ndarray
    cost_kept: np.ndarray

    @classmethod
    def of(
        cls,
        scores: PerRecord,
        swift: PerRecord,
        super_: PerRecord,
        cost_swift: PerRecord | float,
        cost_super: PerRecord | float,
        cost_kept: PerRecord | float = 0.0,
    ) -> "Measured":
        """Checked arrays.

        Args:
          scores: N of the Swift.
          swift: N qualities of the Swift's answers; booleans do.
          super_: N of the Super's.
          cost_swift: of every row, or N of them.
          cost_super: likewise.
          cost_kept: likewise.

        Raises:
          ValueError: there is no row, lengths differ, or a value is out of range; names the field.
        """
        given = {"scores": scores, "swift_correct": swift, "super_correct": super_}
        columns = {name: np.asarray(values, np.float64) for name, values in given.items()}
        n = columns["scores"].size
        require(n >= 1, "scores", list(scores), "give at least one validation row")
        for name, column in columns.items():
            require(column.shape == (n,), f"{name}.shape", column.shape, f"give one value per row ({n})")
        for name in ("swift_correct", "super_correct"):
            bad = ~((columns[name] >= 0) & (columns[name] <= 1))
            require(not bad.any(), name, columns[name][bad][:1].tolist(), "must be qualities in [0, 1]")
        top = columns["scores"][columns["scores"] > ALWAYS_SUPER]
        require(not top.size, "scores", top[:1].tolist(), "must be finite; are the logits finite?")
        costs = {"cost_swift": cost_swift, "cost_super": cost_super, "cost_kept": cost_kept}
        return cls(*columns.values(), *(_costs(name, value, n) for name, value in costs.items()))

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: np.ndarray) -> "Measured":
        """Some of the rows."""
        return Measured(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def at(self, threshold: float) -> CascadePoint:
        """What a threshold gives on these rows."""
        kept = keeps(self.scores, threshold)
        quality = np.where(kept, self.swift, self.super_)
        cost = self.cost_swift + np.where(kept, self.cost_kept, self.cost_super)
        return CascadePoint(
            float(threshold), float(np.mean(~kept)), float(quality.mean()), float(cost.mean())
        )


def _costs(name: str, value: PerRecord | float, n: int) -> np.ndarray:
    costs = np.asarray(value, np.float64)
    require(costs.shape in ((), (n,)), f"{name}.shape", costs.shape, f"give one cost, or one per row ({n})")
    right = np.isfinite(costs).all() and (costs >= 0).all()
    require(bool(right), name, value, "must be finite and at least 0")
    return np.broadcast_to(costs, (n,))


def sweep(rows: Measured) -> CascadeCurve:
    """Every threshold that matters.

    Args:
      rows: N validation rows.

    Returns:
      The curve of at most N + 1 thresholds; the first sends no row with a score to the Super, the last all.
    """
    n = len(rows)
    scores = np.where(np.isnan(rows.scores), -np.inf, rows.scores)
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    scored = int(np.sum(falling >= ALWAYS_SWIFT))
    steps = 1 + np.flatnonzero(falling[: scored - 1] != falling[1:scored]) if scored > 1 else np.zeros(0, int)
    above, below = falling[steps - 1], falling[steps]
    middle = below + (above - below) / 2
    inner = np.where(middle > below, middle, above)
    kept = np.concatenate(([scored], steps[::-1], [0])) if scored else np.zeros(1, int)
    threshold = np.concatenate(([ALWAYS_SWIFT], inner[::-1], [ALWAYS_SUPER])) if scored else [ALWAYS_SUPER]

    def sums(column: np.ndarray) -> np.ndarray:
        return np.concatenate(([0.0], np.cumsum(column[order])))[kept]

    quality = (sums(rows.swift) + rows.super_.sum() - sums(rows.super_)) / n
    cost = rows.cost_swift.mean() + (rows.cost_super.sum() - sums(rows.cost_super - rows.cost_kept)) / n
    means = float(rows.swift.mean()), float(rows.super_.mean())
    return CascadeCurve(np.asarray(threshold), 1 - kept / n, quality, cost, *means, n)


def cheapest(curve: CascadeCurve, accuracy: float) -> CascadePoint:
    """The least mean cost that reaches an accuracy; among equals, the most accurate.

    Raises:
      ValueError: no threshold reaches it; says what the best one gives.
    """
    reached = np.flatnonzero(curve.accuracy >= accuracy - TOLERANCE)
    best = curve.accuracy.max()
    fix = f"no threshold reaches it on these {curve.rows} rows; the best gives {best:.6g} (Super alone "
    fix += f"{curve.super_accuracy:.6g}): lower it, or take a better Super"
    require(reached.size > 0, "target_accuracy", accuracy, fix)
    return curve.point(int(reached[np.lexsort((-curve.accuracy[reached], curve.cost[reached]))[0]]))


def most_accurate(curve: CascadeCurve, cost: float | None = None) -> CascadePoint:
    """The most accurate threshold within a mean cost; among equals, the cheapest.

    Args:
      curve: from `sweep`.
      cost: mean cost of a row, in the unit of the curve; None = any.

    Raises:
      ValueError: the Swift alone costs more.
    """
    within = np.arange(len(curve)) if cost is None else np.flatnonzero(curve.cost <= cost * (1 + TOLERANCE))
    fix = f"the Swift alone costs {curve.cost.min():.6g}: raise it, or take a smaller Swift"
    require(within.size > 0, "target_cost", cost, fix)
    return curve.point(int(within[np.lexsort((curve.cost[within], -curve.accuracy[within]))[0]]))


def like_super(curve: CascadeCurve) -> CascadePoint:
    """The cheapest threshold that is as accurate as the Super alone: E-LANG's own choice."""
    return cheapest(curve, curve.super_accuracy)

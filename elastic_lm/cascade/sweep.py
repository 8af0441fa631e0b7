"""Thresholds between a Swift and a Super model, swept on validation records.

With the Swift's scores s_i, the qualities a_i of its answers and b_i of the Super's, and the costs c_i and
C_i of both, a threshold t gives

    share(t) = mean [s_i < t]                                    records that are passed on to the Super
    accuracy(t) = mean (a_i if s_i >= t else b_i)
    cost(t) = mean (c_i + [s_i < t] C_i)

These change only at the scores, so the thresholds between neighbouring scores, and those below and above all
of them, are every choice there is. Where a Swift knows its score before it answers, c_i is its cost up to
there, and k_i, the cost of the rest of its answer, is added where s_i >= t.

E-LANG takes the cheapest threshold that reaches the Super's accuracy, or the most accurate one
(arXiv 2203.00748). All of these are averages over the records that chose the threshold, hence optimistic;
`guarantee` states what holds for new records.
"""

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np

from elastic_lm.cascade.energy import keeps
from elastic_lm.config.checks import require

ALWAYS_SUPER = sys.float_info.max  # a threshold that no score reaches
ALWAYS_SWIFT = -sys.float_info.max  # a threshold that every score reaches
TOLERANCE = 1e-12  # for sums of accuracies, which are rounded

PerRecord = Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class CascadePoint:
    """What a threshold gives on average over the validation records.

    Example:
      ```python
      from elastic_lm.cascade import CascadePoint, CascadeRule

      point = CascadePoint(threshold=1.3, share_super=0.25, accuracy=0.94, cost=3.5e9)
      rule = CascadeRule(point.threshold, measured=point)
      assert rule.measured.share_super == 0.25
      ```
    """

    threshold: float  # the Swift keeps records with a score of at least this
    share_super: float  # share of the records that are passed on to the Super
    accuracy: float  # mean quality of the answers, in [0, 1]
    cost: float  # mean cost of a record, in the unit of the costs that were given


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CascadeCurve:
    """Every threshold that divides the measured records differently, from the Swift alone to the Super alone.

    Example:
      ```python
      from elastic_lm.cascade import Measurements

      # Three records: the Swift is right where it is sure, the Super is right always.
      measurements = Measurements.of(
          scores=[0.9, 0.5, 0.1], swift=[1, 1, 0], super_=[1, 1, 1], cost_swift=1.0, cost_super=10.0
      )
      curve = measurements.curve()
      assert curve.accuracy.round(3).tolist() == [0.667, 1.0, 1.0, 1.0]
      assert curve.share_super.round(3).tolist() == [0.0, 0.333, 0.667, 1.0]
      ```
    """

    threshold: np.ndarray  # [K] float64, increasing
    share_super: np.ndarray  # [K] float64, increasing
    accuracy: np.ndarray  # [K] float64
    cost: np.ndarray  # [K] float64, mean per record
    swift_accuracy: float  # of the Swift alone
    super_accuracy: float  # of the Super alone
    records: int  # N, that were measured

    def __len__(self) -> int:
        return len(self.threshold)

    def point(self, index: int) -> CascadePoint:
        """One threshold and what it gives."""
        return CascadePoint(
            threshold=float(self.threshold[index]),
            share_super=float(self.share_super[index]),
            accuracy=float(self.accuracy[index]),
            cost=float(self.cost[index]),
        )

    def points(self, most: int = 101) -> tuple[CascadePoint, ...]:
        """At most `most` thresholds, spread evenly over the curve; the first and the last are among them."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).round().astype(int))
        return tuple(self.point(i) for i in chosen)


@dataclasses.dataclass(frozen=True, eq=False)
class Measurements:
    """What was measured of N validation records that both models answered.

    Attributes:
      scores: [N] float64 of the Swift, higher = surer; a record with NaN is passed on.
      swift: [N] float64 quality of the Swift's answers, in [0, 1] (1 = correct).
      super_: [N] float64 quality of the Super's answers.
      cost_swift: [N] float64 cost of the Swift until its score is known, in FLOPs or seconds.
      cost_super: [N] float64 cost of the Super.
      cost_kept: [N] float64 cost of what the Swift does after its score is known.

    Example:
      ```python
      from elastic_lm.cascade import Measurements, fit_rule

      measurements = Measurements.of(
          scores=[0.9, 0.5, 0.1], swift=[1, 1, 0], super_=[1, 1, 1], cost_swift=1.0, cost_super=10.0
      )
      rule = fit_rule(measurements, super_accuracy=True)
      assert 0.1 < rule.threshold < 0.5
      ```
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
    ) -> "Measurements":
        """Makes arrays of what was measured, and checks them.

        Args:
          scores: N scores of the Swift.
          swift: N qualities of the Swift's answers; booleans will do.
          super_: N qualities of the Super's answers.
          cost_swift: one cost for every record, or N costs.
          cost_super: one cost or N, in the same unit.
          cost_kept: one cost or N, in the same unit.

        Raises:
          ValueError: there is no record, lengths differ, or a value is out of range; names the field.
        """
        given = {"scores": scores, "swift_correct": swift, "super_correct": super_}
        columns = {name: np.asarray(values, np.float64) for name, values in given.items()}
        n = columns["scores"].size
        require(n >= 1, "scores", list(scores), "give at least one validation record")
        for name, column in columns.items():
            require(column.shape == (n,), f"{name}.shape", column.shape, f"give one value per record ({n})")
        for name in ("swift_correct", "super_correct"):
            bad = ~((columns[name] >= 0) & (columns[name] <= 1))
            require(not bad.any(), name, columns[name][bad][:1].tolist(), "must be qualities in [0, 1]")
        top = columns["scores"][columns["scores"] > ALWAYS_SUPER]  # infinity; NaN is passed on instead
        require(not top.size, "scores", top[:1].tolist(), "must be finite; are the logits finite?")

        costs = {"cost_swift": cost_swift, "cost_super": cost_super, "cost_kept": cost_kept}
        return cls(*columns.values(), *(_costs(name, value, n) for name, value in costs.items()))

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, indices: np.ndarray) -> "Measurements":
        """What was measured of some of the records."""
        return Measurements(*(getattr(self, field.name)[indices] for field in dataclasses.fields(self)))

    def curve(self) -> CascadeCurve:
        """Every threshold that divides these records differently, and what it gives."""
        return sweep(self)

    def at(self, threshold: float) -> CascadePoint:
        """What a threshold gives on these records."""
        kept = keeps(self.scores, threshold)
        quality = np.where(kept, self.swift, self.super_)
        cost = self.cost_swift + np.where(kept, self.cost_kept, self.cost_super)
        return CascadePoint(
            threshold=float(threshold),
            share_super=float(np.mean(~kept)),
            accuracy=float(quality.mean()),
            cost=float(cost.mean()),
        )


def _costs(name: str, value: PerRecord | float, n: int) -> np.ndarray:
    costs = np.asarray(value, np.float64)
    require(
        costs.shape in ((), (n,)), f"{name}.shape", costs.shape, f"give one cost, or one per record ({n})"
    )
    in_range = np.isfinite(costs).all() and (costs >= 0).all()
    require(bool(in_range), name, value, "must be finite and at least 0")
    return np.broadcast_to(costs, (n,))


def sweep(measurements: Measurements) -> CascadeCurve:
    """Finds every threshold that matters, and what it gives.

    Args:
      measurements: of N validation records.

    Returns:
      The curve of at most N + 1 thresholds. The first passes on only records without a score, the last all.
    """
    n = len(measurements)
    scores = np.where(np.isnan(measurements.scores), -np.inf, measurements.scores)
    order = np.argsort(-scores, kind="stable")  # the surest record first
    falling = scores[order]

    # Places where the score falls: a threshold in between keeps the records before it. Records without a
    # score (-inf) are never kept.
    scored = int(np.sum(falling >= ALWAYS_SWIFT))
    steps = 1 + np.flatnonzero(falling[: scored - 1] != falling[1:scored]) if scored > 1 else np.zeros(0, int)
    above, below = falling[steps - 1], falling[steps]
    middle = below + (above - below) / 2
    inner = np.where(middle > below, middle, above)  # neighbouring floats have no middle; ties are kept

    # From the Swift alone to the Super alone: how many records each threshold keeps.
    kept = np.concatenate(([scored], steps[::-1], [0])) if scored else np.zeros(1, int)
    threshold = np.concatenate(([ALWAYS_SWIFT], inner[::-1], [ALWAYS_SUPER])) if scored else [ALWAYS_SUPER]

    def sum_of_kept(column: np.ndarray) -> np.ndarray:
        return np.concatenate(([0.0], np.cumsum(column[order])))[kept]

    m = measurements
    quality = (sum_of_kept(m.swift) + m.super_.sum() - sum_of_kept(m.super_)) / n
    cost = m.cost_swift.mean() + (m.cost_super.sum() - sum_of_kept(m.cost_super - m.cost_kept)) / n
    return CascadeCurve(
        threshold=np.asarray(threshold),
        share_super=1 - kept / n,
        accuracy=quality,
        cost=cost,
        swift_accuracy=float(m.swift.mean()),
        super_accuracy=float(m.super_.mean()),
        records=n,
    )


def cheapest(curve: CascadeCurve, accuracy: float) -> CascadePoint:
    """The threshold with the least mean cost that reaches an accuracy; among equals, the most accurate.

    Raises:
      ValueError: no threshold reaches it; says what the best one gives.
    """
    reached = np.flatnonzero(curve.accuracy >= accuracy - TOLERANCE)
    if not reached.size:
        best, alone = curve.accuracy.max(), curve.super_accuracy
        raise ValueError(
            f"target_accuracy={accuracy!r}: no threshold reaches it on these {curve.records} records; the "
            f"best gives {best:.6g} (Super alone {alone:.6g}): lower it, or take a better Super"
        )
    return curve.point(int(reached[np.lexsort((-curve.accuracy[reached], curve.cost[reached]))[0]]))


def most_accurate(curve: CascadeCurve, cost: float | None = None) -> CascadePoint:
    """The most accurate threshold within a mean cost; among equals, the cheapest.

    Args:
      curve: from `sweep`.
      cost: mean cost of a record, in the unit of the curve; None = any.

    Raises:
      ValueError: the Swift alone costs more.
    """
    within = np.arange(len(curve)) if cost is None else np.flatnonzero(curve.cost <= cost * (1 + TOLERANCE))
    if not within.size:
        least = curve.cost.min()
        raise ValueError(
            f"target_cost={cost!r}: the Swift alone costs {least:.6g}: raise it, or take a smaller Swift"
        )
    return curve.point(int(within[np.lexsort((curve.cost[within], -curve.accuracy[within]))[0]]))


def like_super(curve: CascadeCurve) -> CascadePoint:
    """The cheapest threshold that is as accurate as the Super alone: E-LANG's own choice."""
    return cheapest(curve, curve.super_accuracy)

"""Thresholds of a cascade of several members, searched together on measured records.

With scores s_1i .. s_{k-1,i} of the members before the last, qualities q_1i .. q_ki and costs c_1i .. c_ki,
thresholds t_1 .. t_{k-1} let record i be answered by

    m_i(t) = the first m with s_mi >= t_m, else k
    accuracy(t) = mean q_{m_i(t)}            cost(t) = mean sum_{j <= m_i(t)} c_j

A member's best threshold depends on the others': one that a larger member stands behind may be stricter.
All combinations of a grid are evaluated exactly. A record lies in one cell of the grid, so that the sums over
the records that member m answers are those of a histogram over its first m axes, accumulated along them:

    sum [b_1 <= g_1] .. [b_{m-1} <= g_{m-1}] [b_m > g_m] v_mi,     b = number of thresholds that s reaches

which costs N + G^(k-1) in place of N G^(k-1). Where no more than G thresholds of a member divide the records
differently, the grid has all of them, and the search is exact; elsewhere it has G of even ranks.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from elastic_lm.cascade.energy import keeps
from elastic_lm.cascade.sweep import ALWAYS_SUPER, ALWAYS_SWIFT, TOLERANCE
from elastic_lm.config.checks import require

MOST_MEMBERS = 12  # the grid has an axis of at least two thresholds for each but the last
CELLS = 2**20  # of a grid at most; 1024 thresholds of each of two members, 101 of each of three
FRONT = 101  # points of a front at most

Thresholds = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class JointPoint:
    """What thresholds give together, on average over the validation records.

    Example:
      ```python
      from elastic_lm.cascade import JointPoint

      point = JointPoint((0.9, 0.5), shares=(0.6, 0.3, 0.1), accuracy=0.94, cost=3.5e9)
      assert point.share_super == 0.1
      ```
    """

    thresholds: Thresholds  # of every member but the last
    shares: tuple[float, ...]  # share of the records that each member answers
    accuracy: float  # mean quality of the answers, in [0, 1]
    cost: float  # mean cost of a record, in the unit of the costs that were given

    @property
    def share_super(self) -> float:
        """Share of the records that reach the last member."""
        return self.shares[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class JointMeasurements:
    """What was measured of N validation records that all k members answered.

    Attributes:
      scores: [k - 1, N] float64 of every member but the last, higher = surer; NaN, which minus infinity
        becomes, is passed on.
      qualities: [k, N] float64 of every member's answers, in [0, 1] (1 = correct).
      costs: [k, N] float64 of every member until its score is known, in FLOPs or seconds.
      kept: [k - 1, N] float64 cost of what a member does after its score is known.

    Example:
      ```python
      from elastic_lm.cascade import JointMeasurements, fit_joint

      # Three members and four records; the second member is right about the second record too.
      measured = JointMeasurements.of(
          scores=[[4, 3, 2, 1], [1, 4, 3, 2]],
          qualities=[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
          costs=[1.0, 10.0, 100.0],
      )
      rule = fit_joint(measured, super_accuracy=True)
      assert rule.measured.shares == (0.25, 0.25, 0.5)
      assert rule.measured.cost == (1 + 11 + 111 + 111) / 4
      ```
    """

    scores: np.ndarray
    qualities: np.ndarray
    costs: np.ndarray
    kept: np.ndarray

    @classmethod
    def of(
        cls,
        scores: Sequence[Sequence[float] | np.ndarray],
        qualities: Sequence[Sequence[float] | np.ndarray],
        costs: Sequence[Sequence[float] | np.ndarray | float],
        kept: Sequence[Sequence[float] | np.ndarray | float] | None = None,
    ) -> "JointMeasurements":
        """Makes arrays of what was measured, and checks them.

        Args:
          scores: N scores of each member but the last, in their order.
          qualities: N qualities of each member's answers; booleans will do.
          costs: of each member, one cost for every record, or N.
          kept: of each member but the last, one cost or N of what it does after its score is known; None =
            nothing.

        Raises:
          ValueError: there are fewer than two members or no record, lengths differ, or a value is out of
            range; names the field.
        """
        k = len(qualities)
        require(k >= 2, "qualities: members", k, "a cascade has at least 2")
        # Every member but the last has a threshold, and all combinations are looked at.
        require(
            k <= MOST_MEMBERS, "qualities: members", k, f"thresholds of at most {MOST_MEMBERS} are searched"
        )
        kept = [0.0] * (k - 1) if kept is None else kept
        for name, given, count in (("scores", scores, k - 1), ("costs", costs, k), ("kept", kept, k - 1)):
            require(
                len(given) == count, f"{name}: members", len(given), f"give one entry for each of {count}"
            )
        n = np.asarray(qualities[0]).size
        require(n >= 1, "qualities", list(qualities), "give at least one validation record")

        tables = {"scores": scores, "qualities": qualities, "costs": costs, "kept": kept}
        found = cls(*(_rows(name, rows, n) for name, rows in tables.items()))
        require(bool(np.all(~(found.scores > ALWAYS_SUPER))), "scores", "inf", "must be finite")
        found.scores[np.isneginf(found.scores)] = np.nan  # no threshold keeps it
        in_range = (found.qualities >= 0) & (found.qualities <= 1)
        require(bool(in_range.all()), "qualities", "a value", "must be qualities in [0, 1]")
        for name, values in (("costs", found.costs), ("kept", found.kept)):
            good = np.isfinite(values).all() and (values >= 0).all()
            require(bool(good), name, "a value", "must be finite and at least 0")
        return found

    def __len__(self) -> int:
        return self.qualities.shape[1]

    @property
    def members(self) -> int:
        """How many there are, k."""
        return len(self.qualities)

    def take(self, indices: np.ndarray) -> "JointMeasurements":
        """What was measured of some of the records."""
        return JointMeasurements(*(getattr(self, f.name)[:, indices] for f in dataclasses.fields(self)))

    def answered_by(self, thresholds: Thresholds) -> np.ndarray:
        """[N] int64 number of the member that answers each record."""
        kept = [keeps(row, t) for row, t in zip(self.scores, thresholds, strict=True)]
        return np.argmax([*kept, np.ones(len(self), bool)], axis=0)

    def at(self, thresholds: Thresholds) -> JointPoint:
        """What thresholds give on these records."""
        by, every = self.answered_by(thresholds), np.arange(len(self))
        return JointPoint(
            thresholds=tuple(map(float, thresholds)),
            shares=tuple((np.bincount(by, minlength=self.members) / len(self)).tolist()),
            accuracy=float(self.qualities[by, every].mean()),
            cost=float(self.record_costs()[by, every].mean()),
        )

    def record_costs(self) -> np.ndarray:
        """[k, N] float64 cost of a record that each member answers, with those before it."""
        total = np.cumsum(self.costs, axis=0)
        total[:-1] += self.kept
        return total

    def harm(self) -> np.ndarray:
        """[k, N] float64 quality that the last member would have added to the answers of each."""
        return np.maximum(self.qualities[-1] - self.qualities, 0.0)


def _rows(name: str, rows: Sequence[Sequence[float] | np.ndarray | float], n: int) -> np.ndarray:
    """[len(rows), n] float64.

    Raises:
      ValueError: a row is neither one number nor n of them.
    """
    columns = []
    for i, row in enumerate(rows):
        try:
            column = np.asarray(row, np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name}[{i}]={row!r:.80}: must be numbers") from None
        columns.append(column)
        one = column.shape == () and name in ("costs", "kept")
        require(
            one or column.shape == (n,),
            f"{name}[{i}].shape",
            column.shape,
            f"give one value per record ({n})",
        )
    return np.stack([np.broadcast_to(column, (n,)) for column in columns])


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Every combination of some thresholds of each member, and what it gives on measured records.

    Attributes:
      thresholds: of each member but the last, [G_m] float64, increasing.
      accuracy: [G_1, .., G_{k-1}] float64.
      cost: [G_1, .., G_{k-1}] float64, mean per record.
      harm: [G_1, .., G_{k-1}] float64, mean per record.
    """

    thresholds: tuple[np.ndarray, ...]
    accuracy: np.ndarray
    cost: np.ndarray
    harm: np.ndarray

    def at(self, cell: int) -> Thresholds:
        """The thresholds of a cell, by its number in the order of the flattened arrays."""
        places = np.unravel_index(cell, self.cost.shape)
        return tuple(float(own[i]) for own, i in zip(self.thresholds, places, strict=True))

    def cheapest(self, allowed: np.ndarray) -> int | None:
        """Number of the cheapest cell, and among equals the most accurate; None = there is none.

        Args:
          allowed: [G_1, .., G_{k-1}] bool.
        """
        cells = np.flatnonzero(allowed)
        if not cells.size:
            return None
        cost, accuracy = self.cost.ravel()[cells], self.accuracy.ravel()[cells]
        near = cost <= cost.min() * (1 + TOLERANCE)
        return int(cells[near][np.argmax(accuracy[near])])

    def front(self) -> list[int]:
        """Numbers of the cells that no cell both costs no more than and is more accurate than, by cost."""
        order = np.lexsort((-self.accuracy.ravel(), self.cost.ravel()))
        accuracy = self.accuracy.ravel()[order]
        best = np.maximum.accumulate(accuracy)
        better = np.concatenate(([True], accuracy[1:] > best[:-1] + TOLERANCE))
        cells = order[better]
        chosen = np.unique(np.linspace(0, len(cells) - 1, min(FRONT, len(cells))).round().astype(int))
        return cells[chosen].tolist()


def grid_of(measured: JointMeasurements, cells: int = CELLS) -> Grid:
    """Evaluates every combination of thresholds of a grid.

    Args:
      measured: of N validation records.
      cells: of the grid at most; each member has as many thresholds.

    Returns:
      The grid.
    """
    axes = measured.members - 1
    most = max(2, int(cells ** (1 / axes) + 1e-9))
    thresholds = tuple(candidates(row, most) for row in measured.scores)
    # The number of thresholds that a score reaches, so that threshold g keeps bins above g; NaN reaches none.
    bins = np.stack(
        [
            np.where(np.isnan(row), 0, np.searchsorted(own, row, side="right"))
            for row, own in zip(measured.scores, thresholds, strict=True)
        ]
    )
    sizes = tuple(map(len, thresholds))
    columns = measured.qualities, measured.record_costs(), measured.harm()
    accuracy, cost, harm = (_means(bins, sizes, values) for values in columns)
    return Grid(thresholds, accuracy, cost, harm)


def candidates(scores: np.ndarray, most: int) -> np.ndarray:
    """Thresholds that divide records differently, from one that keeps all to one that keeps none.

    Args:
      scores: [N] float64; NaN is never kept.
      most: thresholds at most, at least 2; where there are more, those of even ranks are taken.

    Returns:
      [G] float64, increasing.
    """
    own = np.unique(scores[~np.isnan(scores)])
    middle = own[:-1] + (own[1:] - own[:-1]) / 2
    inner = np.where(middle > own[:-1], middle, own[1:])  # neighbouring floats have no middle
    if len(inner) > most - 2:
        # Even ranks of the records, so that no range of scores with many records is passed over.
        ranks = np.sort(scores[~np.isnan(scores)])
        cuts = ranks[np.linspace(0, len(ranks) - 1, most).round().astype(int)[1:-1]]
        places = np.clip(np.searchsorted(own, cuts) - 1, 0, len(inner) - 1)
        inner = inner[np.unique(places)] if most > 2 else inner[:0]
    return np.concatenate(([ALWAYS_SWIFT], inner, [ALWAYS_SUPER]))


def _means(bins: np.ndarray, sizes: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    """[G_1, .., G_{k-1}] float64 mean over records of the value of the member that answers each.

    Args:
      bins: [k - 1, N] int64.
      sizes: G_1 .. G_{k-1}.
      values: [k, N] float64, of each record if each member answered it.
    """
    k, n = values.shape
    total = np.zeros(sizes)
    for m in range(k):
        axes = min(m + 1, k - 1)  # of the members whose scores decide that m answers
        shape = tuple(size + 1 for size in sizes[:axes])
        cell = np.ravel_multi_index(tuple(bins[:axes]), shape)
        sums = np.bincount(cell, values[m], minlength=int(np.prod(shape))).reshape(shape)
        for axis in range(axes):
            below = np.cumsum(sums, axis=axis)
            last = np.take(below, [-1], axis=axis)
            keeps_here = axis == m  # m keeps bins above its threshold, the members before it pass on the rest
            sums = np.take(last - below if keeps_here else below, np.arange(sizes[axis]), axis=axis)
        total += sums.reshape(*sums.shape, *(1 for _ in sizes[axes:]))
    return total / n

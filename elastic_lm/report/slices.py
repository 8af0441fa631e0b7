"""Failure slices: where the items behind an average do worse than it, with an interval of each part.

With x_i in [0, 1] (1 = the cheap answer equals the full one), weights w_i and the items of one slice, such as
the tokens of one file,

    r = sum_i w_i x_i / sum_i w_i

The interval of r is Clopper and Pearson's for as many independent trials as would say the same
(`bounds.effective_trials`), because items of one text are not independent. It is of each slice alone: among
twenty slices whose rates are all right, one lies outside of its 95 % interval by chance.
"""

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from elastic_lm.bounds import effective_trials, rate_interval
from elastic_lm.config.checks import require, require_at_least_1

EPSILON = 0.05  # probability that the interval of one slice misses
LEAST_ITEMS = 30  # a slice of fewer items says nothing on its own
SHOWN = 5  # slices that are printed
SHORTEST = 16  # lengths below this are one bucket
EVERYTHING = "all"

Keys = Sequence[Hashable] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Slice:
    """How the items of one slice do.

    Example:
      ```python
      import elastic_lm as el

      found = el.evaluate.failure_slices([True] * 60 + [False] * 40, {"file": ["a"] * 60 + ["b"] * 40})
      least = found.slices[0]
      assert (least.by, least.name, least.items, least.agreement) == ("file", "b", 40, 0.0)
      ```
    """

    by: str  # what divides the items, such as "file"; "" = they are all here
    name: str  # the part, or "3 others"
    items: int
    agreement: float  # weighted mean
    low: float  # lower end of its interval
    high: float  # upper end
    few: bool = False  # too few items to say anything
    merged: int = 0  # slices of few items that stand here together; 0 = this is one slice


@dataclasses.dataclass(frozen=True)
class FailureSlices:
    """An average and the slices behind it, those of the least agreement first, those of few items last.

    Example:
      ```python
      import elastic_lm as el

      found = el.evaluate.failure_slices([1, 0] * 50, {"kind": ["word", "digits"] * 50})
      print(found.text(items="rows"))
      assert el.evaluate.FailureSlices.from_json(found.to_json()) == found
      ```
    """

    average: Slice
    slices: tuple[Slice, ...]
    epsilon: float = EPSILON  # probability that the interval of one slice misses

    def to_json(self) -> dict[str, Any]:
        """The table as JSON holds it; `from_json` reads it again."""
        return {
            "average": dataclasses.asdict(self.average),
            "slices": [dataclasses.asdict(one) for one in self.slices],
            "epsilon": self.epsilon,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "FailureSlices":
        """The table that `to_json` gave.

        Raises:
          ValueError: the content is of another kind.
        """
        try:
            slices = tuple(Slice(**one) for one in content["slices"])
            return cls(Slice(**content["average"]), slices, float(content["epsilon"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"slices={content!r:.80}: no table of slices ({error})") from error

    def text(self, what: str = "agreement", items: str = "tokens", most: int = SHOWN) -> str:
        """The average and the slices of the least agreement, as lines to print.

        Args:
          what: the rate.
          items: what is counted.
          most: slices to show at most.

        Returns:
          Lines without a final line break; "!" marks slices whose whole interval lies below the average. What
          divides nothing, such as the file where there is one, is left out.
        """
        counts = collections.Counter(one.by for one in self.slices)
        slices = [one for one in self.slices if counts[one.by] > 1]
        kinds = ", ".join(dict.fromkeys(one.by for one in slices))
        if not slices:
            return f"{what} {self.average.agreement:.4f}; nothing divides its {self.average.items} {items}"

        shown = slices[:most]
        width = max(len(items), *(len(f"{one.items:,}") for one in (self.average, *shown)))
        lines = [
            f"{what} by {kinds}, least first ({1 - self.epsilon:.0%} interval of each alone, ! = below the "
            "average):"
        ]
        lines += [_line(one, width, items, self.average.agreement) for one in shown]
        lines.append(_line(self.average, width, items, self.average.agreement))
        if len(slices) > most:
            lines.append(f"  {len(slices) - most} more slices in the file")
        return "\n".join(lines)


def _line(one: Slice, width: int, items: str, average: float) -> str:
    mark = "!" if one.high < average and not one.few else " "
    name = f"{one.by} {one.name}" if one.by else one.name
    few = ", too few to tell" if one.few else ""
    interval = f"{one.low:.4f} to {one.high:.4f}"
    return f"  {one.agreement:.4f} {mark}  {interval}   {one.items:>{width},} {items}   {name}{few}"


def failure_slices(
    agrees: Sequence[float] | np.ndarray,
    keys: Mapping[str, Keys],
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    groups: Keys | None = None,
    least: int = LEAST_ITEMS,
    epsilon: float = EPSILON,
) -> FailureSlices:
    """Divides items into slices in several ways, and says how each slice does.

    Args:
      agrees: [N] numbers in [0, 1] or bool, how far each item is right.
      keys: what divides the items -> [N] the part that each belongs to; the parts are named by `str`.
      weights: [N] how much each item counts, at least 0 and not all 0; None = all alike.
      groups: [N] which items depend on each other, such as the tokens of one row; None = none do. A slice
        that lies in one group is marked like one of few items. One in which nothing varies is taken to depend
        as all items do.
      least: a slice of fewer items is merged with its like into "n others", or marked where it is alone.
      epsilon: probability that the interval of one slice misses.

    Returns:
      The average and all slices.

    Raises:
      ValueError: there is no item, a length is another one, or a number is out of range.

    Example:
      ```python
      import elastic_lm as el

      agrees = [1, 1, 1, 0] * 50
      found = el.evaluate.failure_slices(agrees, {"place": ["first", "second", "third", "fourth"] * 50})
      assert found.slices[0].name == "fourth"
      print(found.text())
      ```
    """
    right = np.asarray(agrees, np.float64)
    n = len(right)
    require(n >= 1, "agrees", list(agrees), "needs at least one item")
    within = bool(np.all((right >= 0) & (right <= 1)))
    require(within, "agrees", float(right.max()), "every number must be in [0, 1]")
    require(0 < epsilon < 1, "epsilon", epsilon, "must be a probability like 0.05")
    require_at_least_1("least", least)

    counted = None if weights is None else np.asarray(weights, np.float64)
    for name, column in (("weights", weights), ("groups", groups), *keys.items()):
        length = n if column is None else len(column)
        require(length == n, f"len({name})", length, f"needs one entry for each of the {n} items")
    if counted is not None:
        usable = bool(np.all(np.isfinite(counted) & (counted >= 0)) and counted.sum() > 0)
        require(usable, "weights", float(counted.min()), "must be at least 0, finite and not all 0")
    group = None if groups is None else _numbered(groups)[0]
    # By what dependence divides the items of all slices together: for slices in which nothing varies.
    all_own = np.ones(n) if counted is None else counted
    dependence = 1.0
    if group is not None:
        dependence = all_own.sum() ** 2 / (all_own @ all_own) / effective_trials(right, group, all_own)

    def of(by: str, name: str, items: np.ndarray, merged: int = 0) -> Slice:
        own = None if counted is None else counted[items]
        rate = float(np.clip(np.average(right[items], weights=own), 0.0, 1.0))  # sums are rounded
        trials = len(items) if own is None else own.sum() ** 2 / (own @ own)
        alone = False
        if group is not None:
            alone = len(np.unique(group[items])) < 2  # nothing tells how far another row would differ
            dependent = effective_trials(right[items], group[items], own)
            trials = dependent if 0 < rate < 1 and not alone else max(1.0, trials / dependence)
        low, high = rate_interval(rate, trials, epsilon)
        return Slice(by, name, len(items), rate, low, high, len(items) < least or alone, merged)

    found = []
    for by, column in keys.items():
        index, names = _numbered(column)
        if counted is not None:
            index = np.where(counted > 0, index, len(names))  # items that do not count are in no slice
        parts = dict(zip(names, _parts(index, len(names)), strict=True))
        parts = {name: items for name, items in parts.items() if len(items)}
        small = {name: items for name, items in parts.items() if len(items) < least}
        if len(small) > 1:
            parts = {name: items for name, items in parts.items() if name not in small}
            found.append(of(by, f"{len(small)} others", np.concatenate([*small.values()]), len(small)))
        found += [of(by, name, items) for name, items in parts.items()]

    found.sort(key=lambda one: (one.few, one.agreement, -one.items))
    everything = np.arange(n) if counted is None else np.flatnonzero(counted > 0)
    return FailureSlices(of("", EVERYTHING, everything), tuple(found), epsilon)


def _numbered(keys: Keys) -> tuple[np.ndarray, list[str]]:
    """([N] number of each key, by first appearance; the names of the keys)."""
    seen: dict[Hashable, int] = {}
    column = keys.tolist() if isinstance(keys, np.ndarray) else keys
    index = np.fromiter((seen.setdefault(key, len(seen)) for key in column), np.int64, len(column))
    return index, [str(key) for key in seen]


def _parts(index: np.ndarray, parts: int) -> list[np.ndarray]:
    """The items of every part, in their order."""
    order = np.argsort(index, kind="stable")
    ends = np.searchsorted(index[order], np.arange(parts), side="right")
    return np.split(order[: ends[-1] if parts else 0], ends[:-1])


def length_buckets(lengths: Sequence[int] | np.ndarray, shortest: int = SHORTEST) -> list[str]:
    """Names of the powers of two between which lengths lie, to slice by.

    Args:
      lengths: [N] whole numbers, at least 0.
      shortest: lengths below this are one bucket.

    Returns:
      [N] names such as "below 16" and "16 to 31".

    Raises:
      ValueError: a length is negative, or `shortest` is below 1.

    Example:
      ```python
      import elastic_lm as el

      assert el.evaluate.length_buckets([3, 16, 70]) == ["below 16", "16 to 31", "64 to 127"]
      ```
    """
    require_at_least_1("shortest", shortest)
    values, index = np.unique(np.asarray(lengths, np.int64), return_inverse=True)
    require(not len(values) or values[0] >= 0, "lengths", values[:1].tolist(), "must be at least 0")

    def name(length: int) -> str:
        if length < shortest:
            return f"below {shortest}"
        first = shortest * 2 ** ((length // shortest).bit_length() - 1)
        return f"{first} to {2 * first - 1}"

    names = [name(int(length)) for length in values]
    return [names[i] for i in index]

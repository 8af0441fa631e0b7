"""Choosing one threshold per exit: fewest layers within a budget of disagreements.

A token is emitted by the first exit j with confidence c_j >= t_j, else at full depth. With d_j = 1
where exit j disagrees with the full model and l_j the layers it needs,

    minimise over t:  sum of layers    subject to    disagreements <= (1 - target) N

Every exit is moved in turn along its own tokens, ranked by confidence, where both sums are
cumulative sums. A sweep over prices p of one disagreement, in layers, minimises layers + p *
disagreements and so decides how the exits share the budget; what it leaves of the budget is spent
by the same moves under the constraint itself.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from elastic_lm.depth.confidence import NEVER_EXITS

Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (layers, disagreements) -> cost


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What thresholds do to a set of tokens.

    Attributes:
      agreement: share of tokens equal to the full model's.
      mean_layers: mean depth at which tokens are emitted.
      shares: share of tokens emitted at each exit, then at full depth.
    """

    agreement: float
    mean_layers: float
    shares: tuple[float, ...]


def emitting_exit(confidence: np.ndarray, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """[N] index of the first exit that fires, E where none does; ties fire."""
    fires = confidence >= np.asarray(thresholds, np.float32)
    return np.where(fires.any(axis=1), fires.argmax(axis=1), confidence.shape[1])


def outcome(
    confidence: np.ndarray, agrees: np.ndarray, depths: Sequence[int], thresholds: Sequence[float]
) -> Outcome:
    """Agreement, mean depth and exit shares of sequential exits.

    Args:
      confidence: [N, E].
      agrees: [N, E] bool.
      depths: layers of each exit, then of the full model: E + 1 of them.
      thresholds: E of them.
    """
    chosen = emitting_exit(confidence, thresholds)
    full = np.column_stack([agrees, np.ones(len(agrees), bool)])
    counts = np.bincount(chosen, minlength=len(depths))
    shares = counts / len(chosen)
    return Outcome(
        agreement=float(full[np.arange(len(chosen)), chosen].mean()),
        mean_layers=float(shares @ np.asarray(depths)),
        shares=tuple(shares.tolist()),
    )


class Tokens:
    """The tokens that thresholds are chosen on, ranked once per exit.

    Candidates of exit j are observed confidences c_0 > c_1 > ...; a token has rank r where c_r is the
    first of them that it reaches, so "threshold c_k" means "ranks up to k exit". Position k = -1
    stands for never.
    """

    def __init__(
        self, confidence: np.ndarray, agrees: np.ndarray, depths: Sequence[int], candidates: int = 1024
    ):
        """Creates a search over [N, E] confidences and agreements; `depths` as in `outcome`."""
        self.n, self.exits = confidence.shape
        self.wrong = np.column_stack([~agrees, np.zeros(self.n, bool)]).astype(np.int64)
        self.depths = np.asarray(depths)
        self.values = [_candidates(confidence[:, j], candidates) for j in range(self.exits)]
        self.ranks = [np.searchsorted(-v, -confidence[:, j]) for j, v in enumerate(self.values)]

    def thresholds(self, positions: np.ndarray) -> tuple[float, ...]:
        """Thresholds at the given positions."""
        pairs = zip(self.values, positions, strict=True)
        return tuple(float(values[k]) if k >= 0 else NEVER_EXITS for values, k in pairs)

    def line(self, j: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Total layers and disagreements at every position of exit j, from -1 on, the others fixed."""
        chosen = np.full(self.n, self.exits)
        for i in reversed(range(self.exits)):
            if i != j:
                chosen[self.ranks[i] <= positions[i]] = i
        reached = np.flatnonzero(chosen > j)
        before, rank = chosen[reached], self.ranks[j][reached]
        layers = self.depths[j] - self.depths[before]
        errors = self.wrong[reached, j] - self.wrong[reached, before]
        size = len(self.values[j])  # also the rank of silenced tokens, which no position reaches
        layers, errors = (np.bincount(rank, x, size + 1)[:size].cumsum() for x in (layers, errors))
        wrong = self.wrong[np.arange(self.n), chosen].sum()
        return np.append(0, layers) + self.depths[chosen].sum(), np.append(0, errors) + wrong

    def descend(self, positions: np.ndarray, cost: Cost) -> "Candidate":
        """Moves one exit after the other, the deepest first, until no move lowers the cost."""
        positions, best = positions.copy(), np.inf
        found = Candidate(positions, 0.0, 0.0)
        while True:
            before = best
            for j in reversed(range(self.exits)):
                layers, errors = self.line(j, positions)
                costs = cost(layers, errors)
                i = int(np.argmin(costs))
                positions[j], best = i - 1, costs[i]
                found = Candidate(positions, float(layers[i]), float(errors[i]))
            if not best < before:
                return found

    def priced(self, price: float) -> "Candidate":
        """The best thresholds when one disagreement costs `price` layers."""
        return self.descend(np.full(self.exits, -1), lambda layers, errors: layers + price * errors)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Positions of all exits, and what they add up to over all tokens."""

    positions: np.ndarray
    layers: float
    errors: float


def _candidates(confidence: np.ndarray, most: int) -> np.ndarray:
    """Observed confidences in decreasing order, thinned out to equal numbers of tokens; none silenced."""
    confidence = confidence[confidence >= 0]
    values = np.unique(confidence)
    if len(values) > most:
        values = np.unique(np.quantile(confidence, np.linspace(0, 1, most), method="nearest"))
    return values[::-1]


def choose(
    confidence: np.ndarray,
    agrees: np.ndarray,
    depths: Sequence[int],
    targets: Sequence[float],
    prices: int = 32,
) -> dict[float, tuple[float, ...]]:
    """Thresholds for every target; a higher target never needs fewer layers on these tokens.

    Args:
      confidence: [N, E] float32.
      agrees: [N, E] bool, the exit's token is the full model's.
      depths: layers of each exit, then of the full model: E + 1 of them.
      targets: wanted shares of tokens equal to the full model's, in (0, 1].
      prices: how many prices of a disagreement are tried for all targets; more are tried for each.

    Returns:
      {target: E thresholds}; all `NEVER_EXITS` where no exit can be used within the budget.
    """
    tokens = Tokens(confidence, agrees, depths)
    never = Candidate(np.full(tokens.exits, -1), float(tokens.n * depths[-1]), 0.0)
    pool = [never]
    tried = {price: tokens.priced(price) for price in np.geomspace(0.25, 2.0 * tokens.n * depths[-1], prices)}
    chosen = {}
    for target in sorted(targets, reverse=True):
        budget = np.floor((1.0 - target) * tokens.n + 1e-6)
        _bisect(tokens, tried, budget)

        def within(layers: np.ndarray, errors: np.ndarray, budget: float = budget) -> np.ndarray:
            return np.where(errors <= budget, layers, np.inf)

        feasible = [c for c in (*pool, *tried.values()) if c.errors <= budget]
        start = min(feasible, key=lambda c: c.layers)
        pool.append(tokens.descend(start.positions, within))
        chosen[target] = tokens.thresholds(pool[-1].positions)
    return chosen


def _bisect(tokens: Tokens, tried: dict[float, Candidate], budget: float, steps: int = 8) -> None:
    """Tries prices between the highest that exceeds the budget and the lowest that keeps it."""
    for _ in range(steps):
        low = max((p for p, c in tried.items() if c.errors > budget), default=None)
        high = min((p for p, c in tried.items() if c.errors <= budget and p > (low or 0)), default=None)
        if low is None or high is None:
            return
        price = (low * high) ** 0.5
        tried[price] = tokens.priced(price)

"""Choosing one threshold per exit, all exits together: fewest layers within a budget of disagreements.

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
class ExitOutcome:
    """What exits with given thresholds do to a set of tokens.

    Attributes:
      agreement: share of tokens equal to the full model's.
      mean_layers: mean depth at which tokens are emitted.
      shares: share of tokens emitted at each exit, then at full depth.
    """

    agreement: float
    mean_layers: float
    shares: tuple[float, ...]


def exit_outcome(
    confidence: np.ndarray, agrees: np.ndarray, depths: Sequence[int], thresholds: Sequence[float]
) -> ExitOutcome:
    """Agreement, mean depth and exit shares of sequential exits.

    Args:
      confidence: [N, E] float32.
      agrees: [N, E] bool, the exit's token is the full model's.
      depths: layers of each exit, then of the full model: E + 1 of them.
      thresholds: E of them.
    """
    chosen = emitting_exit(confidence, thresholds)
    full = np.column_stack([agrees, np.ones(len(agrees), bool)])
    counts = np.bincount(chosen, minlength=len(depths))
    shares = counts / len(chosen)
    return ExitOutcome(
        agreement=float(full[np.arange(len(chosen)), chosen].mean()),
        mean_layers=float(shares @ np.asarray(depths)),
        shares=tuple(shares.tolist()),
    )


def emitting_exit(confidence: np.ndarray, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """[N] index of the first exit that fires, E where none does; ties fire."""
    fires = confidence >= np.asarray(thresholds, np.float32)
    return np.where(fires.any(axis=1), fires.argmax(axis=1), confidence.shape[1])


def choose_thresholds(
    confidence: np.ndarray,
    agrees: np.ndarray,
    depths: Sequence[int],
    targets: Sequence[float],
    prices: int = 32,
) -> dict[float, tuple[float, ...]]:
    """Thresholds for every target; a higher target never needs fewer layers on these tokens.

    Args:
      confidence: [N, E] float32; negative where a gate silenced the exit, which then never fires.
      agrees: [N, E] bool, the exit's token is the full model's.
      depths: layers of each exit, then of the full model: E + 1 of them.
      targets: wanted shares of tokens equal to the full model's, in (0, 1].
      prices: how many prices of a disagreement are tried for all targets; more are tried for each.

    Returns:
      {target: E thresholds}; all `NEVER_EXITS` where no exit can be used within the budget.
    """
    tokens = RankedTokens(confidence, agrees, depths)
    whole = float(tokens.n * depths[-1])
    found = [TriedThresholds(np.full(tokens.exits, -1), layers=whole, disagreements=0.0)]  # no exit is used
    tried = {price: tokens.best_at_price(price) for price in np.geomspace(0.25, 2.0 * whole, prices)}

    chosen = {}
    # From the highest target down: thresholds that keep a higher target keep every lower one as well.
    for target in sorted(targets, reverse=True):
        # Without the small number, rounding would take one disagreement from budgets like (1 - 0.93) * 100.
        budget = np.floor((1.0 - target) * tokens.n + 1e-6)
        _bisect_prices(tokens, tried, budget)

        def within(layers: np.ndarray, disagreements: np.ndarray, budget: float = budget) -> np.ndarray:
            return np.where(disagreements <= budget, layers, np.inf)

        feasible = [t for t in (*found, *tried.values()) if t.disagreements <= budget]
        start = min(feasible, key=lambda t: t.layers)
        found.append(tokens.descend(start.positions, within))
        chosen[target] = tokens.thresholds(found[-1].positions)
    return chosen


def _bisect_prices(
    tokens: "RankedTokens", tried: dict[float, "TriedThresholds"], budget: float, steps: int = 8
) -> None:
    """Tries prices between the highest that exceeds the budget and the lowest that keeps it."""
    for _ in range(steps):
        low = max((p for p, t in tried.items() if t.disagreements > budget), default=None)
        keeping = (p for p, t in tried.items() if t.disagreements <= budget and p > (low or 0))
        high = min(keeping, default=None)
        if low is None or high is None:
            return

        price = (low * high) ** 0.5
        tried[price] = tokens.best_at_price(price)


@dataclasses.dataclass(frozen=True)
class TriedThresholds:
    """Thresholds of all exits, as positions (see `RankedTokens`), and their sums over all tokens."""

    positions: np.ndarray
    layers: float
    disagreements: float


class RankedTokens:
    """The tokens that thresholds are chosen on, ranked once per exit.

    The thresholds that are tried for exit j are observed confidences c_0 > c_1 > ...; a token has rank r
    where c_r is the first of them that it reaches, so that "threshold c_k" means "ranks up to k exit".
    Position k = -1 stands for never.
    """

    def __init__(
        self, confidence: np.ndarray, agrees: np.ndarray, depths: Sequence[int], candidates: int = 1024
    ) -> None:
        """Ranks the tokens.

        Args:
          confidence: [N, E] float32.
          agrees: [N, E] bool.
          depths: layers of each exit, then of the full model: E + 1 of them.
          candidates: thresholds that are tried per exit at most.
        """
        self.n, self.exits = confidence.shape
        self.wrong = np.column_stack([~agrees, np.zeros(self.n, bool)]).astype(np.int64)
        self.depths = np.asarray(depths)
        self.values = [_candidates(confidence[:, j], candidates) for j in range(self.exits)]
        self.ranks = [np.searchsorted(-v, -confidence[:, j]) for j, v in enumerate(self.values)]

    def thresholds(self, positions: np.ndarray) -> tuple[float, ...]:
        """The thresholds at the given positions."""
        pairs = zip(self.values, positions, strict=True)
        return tuple(float(values[k]) if k >= 0 else NEVER_EXITS for values, k in pairs)

    def best_at_price(self, price: float) -> TriedThresholds:
        """The best thresholds if one disagreement costs as much as `price` layers."""
        never = np.full(self.exits, -1)
        return self.descend(never, lambda layers, disagreements: layers + price * disagreements)

    def descend(self, positions: np.ndarray, cost: Cost) -> TriedThresholds:
        """Moves one exit after the other, the deepest first, until no move lowers the cost."""
        positions, best = positions.copy(), np.inf
        found = TriedThresholds(positions, 0.0, 0.0)
        while True:
            before = best
            for j in reversed(range(self.exits)):
                layers, disagreements = self.sums_along(j, positions)
                costs = cost(layers, disagreements)
                i = int(np.argmin(costs))
                positions[j], best = i - 1, costs[i]
                found = TriedThresholds(positions, float(layers[i]), float(disagreements[i]))
            if not best < before:
                return found

    def sums_along(self, j: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Total layers and disagreements at every position of exit j, from -1 on, the others fixed."""
        # Where tokens would leave if exit j never fired.
        chosen = np.full(self.n, self.exits)
        for i in reversed(range(self.exits)):
            if i != j:
                chosen[self.ranks[i] <= positions[i]] = i

        # What changes for each token that reaches exit j, once it leaves there.
        reached = np.flatnonzero(chosen > j)
        before, rank = chosen[reached], self.ranks[j][reached]
        layers = self.depths[j] - self.depths[before]
        wrong = self.wrong[reached, j] - self.wrong[reached, before]

        # A position lets all ranks up to its own leave, so the sums are cumulative.
        size = len(self.values[j])  # also the rank of silenced tokens, which no position reaches
        layers, wrong = (np.bincount(rank, x, size + 1)[:size].cumsum() for x in (layers, wrong))
        all_layers = self.depths[chosen].sum()
        all_wrong = self.wrong[np.arange(self.n), chosen].sum()
        return np.append(0, layers) + all_layers, np.append(0, wrong) + all_wrong


def _candidates(confidence: np.ndarray, most: int) -> np.ndarray:
    """Observed confidences in decreasing order, thinned out to equal numbers of tokens; none silenced."""
    confidence = confidence[confidence >= 0]
    values = np.unique(confidence)
    if len(values) > most:
        values = np.unique(np.quantile(confidence, np.linspace(0, 1, most), method="nearest"))
    return values[::-1]

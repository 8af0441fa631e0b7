"""Choosing one threshold per exit: fewest layers within a budget of disagreements.

A token is emitted by the first exit j with confidence c_j >= t_j, else at full depth. With d_j = 1
where exit j disagrees with the full model and l_j the layers it needs,

    minimise over t:  sum of layers    subject to    disagreements <= (1 - target) N

Every exit is moved in turn along its own tokens, sorted by confidence, where both sums are
cumulative sums. A sweep over prices p of one disagreement, in layers, minimises layers + p *
disagreements and so decides how the exits share the budget; what it leaves of the budget is spent
by the same moves under the constraint itself.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

NEVER = 2.0  # a threshold that no confidence reaches

Choose = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (layers, disagreements) -> costs


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
    """The tokens that thresholds are chosen on, sorted once per exit."""

    def __init__(self, confidence: np.ndarray, agrees: np.ndarray, depths: Sequence[int]):
        """Creates a search over [N, E] confidences and agreements; `depths` as in `outcome`."""
        self.confidence, self.wrong = confidence.astype(np.float32), ~agrees
        self.depths = np.asarray(depths)
        self.order = np.argsort(-self.confidence, axis=0, kind="stable")
        self.n, self.exits = confidence.shape

    def line(self, j: int, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every useful threshold of exit j while the others stay as they are.

        Returns:
          (thresholds, total layers, total disagreements), first entry: exit j never fires.
        """
        others = thresholds.copy()
        others[j] = NEVER
        chosen = emitting_exit(self.confidence, others)
        wrong = np.column_stack([self.wrong, np.zeros(self.n, bool)])[np.arange(self.n), chosen]
        reached = chosen > j
        order = self.order[:, j]
        layers = np.where(reached, self.depths[j] - self.depths[chosen], 0)[order]
        errors = np.where(reached, self.wrong[:, j].astype(int) - wrong, 0)[order]
        values = self.confidence[order, j]
        ends = np.append(values[1:] < values[:-1], True)  # equal confidences exit together
        return (
            np.append(NEVER, values[ends]),
            self.depths[chosen].sum() + np.append(0, np.cumsum(layers)[ends]),
            wrong.sum() + np.append(0, np.cumsum(errors)[ends]),
        )

    def descend(self, thresholds: np.ndarray, cost: Choose) -> tuple[np.ndarray, int, int]:
        """Moves one exit after the other, the deepest first, until no move lowers the cost.

        Returns:
          (thresholds, total layers, total disagreements).
        """
        thresholds, layers, errors, best = thresholds.copy(), 0, 0, np.inf
        while True:
            before = best
            for j in reversed(range(self.exits)):
                values, all_layers, all_errors = self.line(j, thresholds)
                costs = cost(all_layers, all_errors)
                i = int(np.argmin(costs))
                thresholds[j], best = values[i], costs[i]
                layers, errors = int(all_layers[i]), int(all_errors[i])
            if not best < before:
                return thresholds, layers, errors


def choose(
    confidence: np.ndarray,
    agrees: np.ndarray,
    depths: Sequence[int],
    targets: Sequence[float],
    prices: int = 48,
) -> dict[float, tuple[float, ...]]:
    """Thresholds for every target; a higher target never needs fewer layers on these tokens.

    Args:
      confidence: [N, E] float32.
      agrees: [N, E] bool, the exit's token is the full model's.
      depths: layers of each exit, then of the full model: E + 1 of them.
      targets: wanted shares of tokens equal to the full model's, in (0, 1].
      prices: how many prices of a disagreement are tried.

    Returns:
      {target: E thresholds}; all `NEVER` where no exit can be used within the budget.
    """
    tokens = Tokens(confidence, agrees, depths)
    never = np.full(tokens.exits, NEVER, np.float32)
    grid = np.geomspace(0.25, 2.0 * tokens.n * depths[-1], prices)
    pool = [(never, tokens.n * depths[-1], 0)]
    pool += [tokens.descend(never, lambda layers, errors, p=p: layers + p * errors) for p in grid]
    chosen = {}
    for target in sorted(targets, reverse=True):
        budget = int(np.floor((1.0 - target) * tokens.n + 1e-6))

        def within(layers: np.ndarray, errors: np.ndarray, budget: int = budget) -> np.ndarray:
            return np.where(errors <= budget, layers, np.inf)

        start = min((c for c in pool if c[2] <= budget), key=lambda c: c[1])
        found = tokens.descend(start[0], within)
        pool.append(found)
        chosen[target] = tuple(float(x) for x in found[0])
    return chosen

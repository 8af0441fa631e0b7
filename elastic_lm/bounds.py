"""Finite-sample bounds on a mean loss, and the test of candidates in a fixed order: what both guarantees use.

The hypothesis "the expected loss is above a" has, for n independent losses in [0, 1] with mean r, the
Hoeffding-Bentkus p-value

    p = min( exp(-n h(min(r, a), a)),  e P(Bin(n, a) <= ceil(n r)) )
    h(x, a) = x ln(x / a) + (1 - x) ln((1 - x) / (1 - a))

and "more than a share d of all losses is above a", with k such losses among the n, has

    q = P(Bin(n, d) <= k)

Candidates whose order was fixed before, on other data, are tested one after the other and accepted until the
first whose p-value is above epsilon (Learn-then-Test). No correction for the number of tests is needed: with
probability at least 1 - epsilon, every accepted candidate is what was stated.

Paper: Learn then Test, arXiv 2110.01052.
"""

import dataclasses
import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

# scipy imports its parts when they are first used. `scipy.stats` alone takes longer than all of this package,
# and every sampler imports this module by way of its policy.
import scipy

from elastic_lm.config.checks import require

RUNGS = 16  # candidates that are tested at most
ROOT = 5e-10  # precision of `risk_bound`

Candidate = TypeVar("Candidate")


def hoeffding_bentkus(risk: float, n: int, allowed: float) -> float:
    """p-value of "the expected loss is above `allowed`".

    Args:
      risk: mean of the independent losses, in [0, 1].
      n: number of losses.
      allowed: the expected loss that is still allowed, in (0, 1).

    Returns:
      A number in (0, 1]; a small one says that the expected loss is at most `allowed`.

    Raises:
      ValueError: an argument is out of range.
    """
    require(0 < allowed < 1, "allowed", allowed, "must be a share between 0 and 1")
    require(0 <= risk <= 1, "risk", risk, "must be a mean loss in [0, 1]")
    require(n >= 1, "n", n, "needs at least one sequence")

    hoeffding = math.exp(-n * _divergence(min(risk, allowed), allowed))
    # n * risk is a sum of losses up to rounding, which must not lift a whole number to the next.
    bentkus = math.e * binomial_tail(math.ceil(n * risk - 1e-9), n, allowed)
    return min(1.0, hoeffding, bentkus)


def _divergence(x: float, a: float) -> float:
    """Kullback-Leibler divergence of Bernoulli(x) from Bernoulli(a), in nats."""
    return float(scipy.special.rel_entr(x, a) + scipy.special.rel_entr(1 - x, 1 - a))


def binomial_tail(count: int, n: int, rate: float) -> float:
    """P(Bin(n, rate) <= count): p-value of "errors come at more than `rate`"."""
    return 1.0 if count >= n else float(scipy.special.bdtr(count, n, rate))


def clopper_pearson(wrong: int, n: int, epsilon: float) -> float:
    """Upper bound on a rate of errors that holds with probability at least 1 - epsilon.

    The trials have to be independent: count sequences, or one token per sequence. Counted over all tokens of
    the sequences, the bound is far too low, because tokens of one sequence share their context.

    Args:
      wrong: errors among the trials.
      n: independent trials.
      epsilon: probability with which the bound may fail.

    Returns:
      The exact one-sided bound, in (0, 1].

    Raises:
      ValueError: an argument is out of range.
    """
    require(n >= 1, "n", n, "needs at least one trial")
    require(0 <= wrong <= n, "wrong", wrong, f"must be a count of n={n} trials")
    require(0 < epsilon < 1, "epsilon", epsilon, "must be a probability like 0.05")
    test = scipy.stats.binomtest(wrong, n, alternative="less")
    return float(test.proportion_ci(1 - epsilon, method="exact").high)


def effective_trials(events: np.ndarray, group: np.ndarray, weights: np.ndarray | None = None) -> float:
    """How many independent trials say as much about a rate as trials that come in groups.

    Tokens of one text share their context, so that their rate varies more from text to text than that of
    independent tokens would. With r the rate, n trials and G groups g,

        n / max(1, v / (r (1 - r) / n)),    v = G / (G - 1) sum_g (sum_{i in g} x_i - r)^2 / n^2

    With weights w_i, r is the weighted rate, w_i (x_i - r) is summed, the square of the sum of weights takes
    the place of n^2 in v, and n is Kish's (sum w_i)^2 / sum w_i^2.

    Args:
      events: [n] bool, whether the event happened; or how far it did, in [0, 1].
      group: [n] which group a trial belongs to.
      weights: [n] how much each trial counts, not all 0; None = all alike.

    Returns:
      A number from 1 to n; n where there is one group, or nothing varies.

    Paper: Korn and Graubard 1998, Confidence intervals for proportions with small expected number of
    positive counts estimated from survey data.
    """
    weights = np.ones(len(events)) if weights is None else weights
    total = float(weights.sum())
    n, rate = total**2 / float(weights @ weights), float(weights @ events) / total
    _, index = np.unique(group, return_inverse=True)
    groups = int(index.max()) + 1
    if groups < 2 or rate in (0.0, 1.0):
        return float(n)

    excess = np.bincount(index, weights * (events - rate))
    variance = groups / (groups - 1) * float(excess @ excess) / total**2
    return max(1.0, n / max(1.0, variance / (rate * (1 - rate) / n)))


def rate_interval(rate: float, trials: float, epsilon: float) -> tuple[float, float]:
    """Clopper and Pearson's two-sided interval of a rate.

    Args:
      rate: that was found, in [0, 1].
      trials: independent ones, or how many would say the same (`effective_trials`); above 0.
      epsilon: probability with which the interval may miss, half of it at either end.

    Returns:
      (lower end, upper end).

    Raises:
      ValueError: an argument is out of range.
    """
    require(0 <= rate <= 1, "rate", rate, "must be in [0, 1]")
    require(trials > 0, "trials", trials, "must be above 0")
    require(0 < epsilon < 1, "epsilon", epsilon, "must be a probability like 0.05")
    happened, missed = rate * trials, (1 - rate) * trials
    inverse = scipy.special.betaincinv
    low = float(inverse(happened, missed + 1, epsilon / 2)) if happened > 0 else 0.0
    high = float(inverse(happened + 1, missed, 1 - epsilon / 2)) if missed > 0 else 1.0
    return low, high


def risk_bound(risk: float, n: int, epsilon: float) -> float:
    """Upper bound on the expected loss that holds with probability at least 1 - epsilon.

    Args:
      risk: mean of the independent losses, in [0, 1].
      n: number of losses.
      epsilon: probability with which the bound may fail.

    Returns:
      The smallest allowed loss with a Hoeffding-Bentkus p-value of at most epsilon, rounded up by at most
      1e-9.
    """

    def excess(allowed: float) -> float:
        return hoeffding_bentkus(risk, n, allowed) - epsilon

    highest = 1 - 2 * ROOT
    if risk >= highest or excess(highest) > 0:
        return 1.0

    # At the mean loss itself the p-value is 1. The root is found to within ROOT; adding ROOT keeps the bound
    # on the safe side.
    lowest = max(risk, sys.float_info.min)
    return scipy.optimize.bisect(excess, lowest, highest, xtol=ROOT) + ROOT


def sequences_needed(risk: float, allowed: float, epsilon: float, most: int = 10**9) -> int | None:
    """How many testing sequences with this mean loss would be enough.

    Args:
      risk: mean loss, in [0, 1].
      allowed: the expected loss that is still allowed, in (0, 1).
      epsilon: the p-value to reach.
      most: numbers above this count as out of reach.

    Returns:
      The smallest such number, as a bisection finds it; None where the risk is not below what is allowed, or
      more than `most` would be needed.
    """

    def enough(n: int) -> bool:
        return hoeffding_bentkus(risk, n, allowed) <= epsilon

    if risk >= allowed or not enough(most):
        return None

    high = 1
    while not enough(high):
        high *= 2
    return bisect_left(range(high), True, lo=high // 2 + 1, key=enough)


def p_value(losses: np.ndarray, allowed: float, share: float | None = None) -> float:
    """p-value of "the losses are not as small as stated".

    Args:
      losses: [n] independent losses in [0, 1].
      allowed: stated bound on their expectation, in (0, 1).
      share: stated bound on the share of losses above `allowed`; None = not stated.

    Returns:
      The largest p-value of what is stated: that of "one of the statements is false".
    """
    expected = hoeffding_bentkus(float(losses.mean()), len(losses), allowed)
    if share is None:
        return expected
    return max(expected, binomial_tail(count_above(losses, allowed), len(losses), share))


def count_above(losses: np.ndarray, allowed: float) -> int:
    """Number of losses [n] above `allowed` by more than rounding."""
    return int((losses > allowed + 1e-9).sum())


@dataclasses.dataclass(frozen=True)
class Verdict(Generic[Candidate]):
    """Which candidates passed, and the losses of the last one that did, or of the first where none did."""

    chosen: Candidate  # the last that passed; where none did, the one that loses nothing
    described: Candidate  # whose losses these are
    losses: np.ndarray  # [n]
    p_value: float  # of "they are not as small as stated"
    accepted: int  # candidates that passed, one after the other
    tested: int  # candidates that were tested
    more: int | None  # about how many more losses are needed; None = enough, or no number helps


def fixed_sequence_test(
    candidates: Sequence[Candidate],
    losses: Callable[[Candidate], np.ndarray],
    allowed: float,
    epsilon: float,
    *,
    otherwise: Candidate,
    share: float | None = None,
) -> Verdict[Candidate]:
    """Tests candidates one after the other until the first that fails.

    Args:
      candidates: in an order that was fixed on other data, the most cautious first.
      losses: candidate -> [n] independent losses in [0, 1]; called only for candidates that are tested.
      allowed: stated bound on the expected loss, in (0, 1).
      epsilon: probability with which any candidate that is not as stated may pass.
      otherwise: the candidate that loses nothing: chosen where none passes, described where none is tested.
      share: stated bound on the share of losses above `allowed`; None = not stated.

    Returns:
      The verdict.
    """
    results = []  # (candidate, losses, p-value); all of them pass, except possibly the last
    for candidate in candidates:
        found = losses(candidate)
        results.append((candidate, found, p_value(found, allowed, share)))
        if results[-1][-1] > epsilon:
            break

    accepted = sum(p <= epsilon for *_, p in results)
    if results:
        described, found, p = results[max(accepted - 1, 0)]
    else:
        described, found = otherwise, losses(otherwise)
        p = p_value(found, allowed, share)

    return Verdict(
        chosen=described if accepted else otherwise,
        described=described,
        losses=found,
        p_value=p,
        accepted=accepted,
        tested=len(results),
        more=None if accepted else _more_needed(found, allowed, epsilon, share),
    )


def _more_needed(losses: np.ndarray, allowed: float, epsilon: float, share: float | None) -> int | None:
    """How many losses to add to these before they would pass; None where no number helps."""
    n = len(losses)
    needed = [sequences_needed(float(losses.mean()), allowed, epsilon)]
    if share is not None:
        needed.append(sequences_needed(count_above(losses, allowed) / n, share, epsilon))

    counts = [count for count in needed if count is not None]
    return max(1, max(counts) - n) if len(counts) == len(needed) else None

"""Finite-sample bounds on a mean, and the fixed-sequence test of candidates, that both guarantees use."""

import math
from collections.abc import Iterable

from scipy import special

from elastic_lm.config.checks import require


def hoeffding_bentkus(risk: float, n: int, allowed: float) -> float:
    """p-value of "the expected loss is above `allowed`".

    Args:
      risk: mean loss of the sequences, in [0, 1].
      n: independent sequences.
      allowed: the expected loss that is still allowed, in (0, 1).

    Returns:
      A number in (0, 1]; small = the expected loss is at most `allowed`.

    Raises:
      ValueError: an argument is out of range.
    """
    require(0 < allowed < 1, "allowed", allowed, "must be a share between 0 and 1")
    require(0 <= risk <= 1, "risk", risk, "must be a mean loss in [0, 1]")
    require(n >= 1, "n", n, "needs at least one sequence")
    hoeffding = math.exp(-n * _divergence(min(risk, allowed), allowed))
    bentkus = math.e * binomial_tail(math.ceil(n * risk - 1e-9), n, allowed)
    return min(1.0, hoeffding, bentkus)


def _divergence(x: float, a: float) -> float:
    """Kullback-Leibler divergence of Bernoulli(x) from Bernoulli(a), in nats."""
    first = x * math.log(x / a) if x > 0 else 0.0
    return first + ((1 - x) * math.log((1 - x) / (1 - a)) if x < 1 else 0.0)


def binomial_tail(count: int, n: int, rate: float) -> float:
    """P(Bin(n, rate) <= count): p-value of "errors come at more than `rate`"."""
    return 1.0 if count >= n else float(special.bdtr(count, n, rate))


def clopper_pearson(wrong: int, n: int, epsilon: float) -> float:
    """Upper bound on a rate of errors that holds with probability at least 1 - epsilon.

    The trials have to be independent: count sequences, or one token per sequence. Over all tokens of
    sequences this is no bound on anything but the tokens' own, teacher-forced, average.

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
    return 1.0 if wrong == n else float(special.betaincinv(wrong + 1, n - wrong, 1 - epsilon))


def risk_bound(risk: float, n: int, epsilon: float) -> float:
    """Upper bound on the expected loss that holds with probability at least 1 - epsilon.

    Args:
      risk: mean loss of the sequences, in [0, 1].
      n: independent sequences.
      epsilon: probability with which the bound may fail.

    Returns:
      The smallest allowed loss with a Hoeffding-Bentkus p-value of at most epsilon, to 1e-9.
    """
    low, high = risk, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if hoeffding_bentkus(risk, n, middle) <= epsilon else (middle, high)
    return high


def sequences_needed(risk: float, allowed: float, epsilon: float, most: int = 10**9) -> int | None:
    """How many testing sequences with this mean loss would be enough.

    Args:
      risk: mean loss, in [0, 1].
      allowed: the expected loss that is still allowed, in (0, 1).
      epsilon: the p-value to reach.
      most: numbers above this count as out of reach.

    Returns:
      The number to within the steps of a bisection; None where the risk is not below what is allowed, or
      more than `most` would be needed.
    """
    if risk >= allowed or hoeffding_bentkus(risk, most, allowed) > epsilon:
        return None
    low, high = 0, 1
    while hoeffding_bentkus(risk, high, allowed) > epsilon:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        accepted = hoeffding_bentkus(risk, middle, allowed) <= epsilon
        low, high = (low, middle) if accepted else (middle, high)
    return high


def fixed_sequence(p_values: Iterable[float], epsilon: float) -> int:
    """How many hypotheses, tested in the given order, are rejected before the first that is not.

    Args:
      p_values: one per hypothesis, in an order that was fixed before; read up to the first failure.
      epsilon: probability with which any true hypothesis may be rejected.
    """
    count = 0
    for p_value in p_values:
        if p_value > epsilon:
            break
        count += 1
    return count


RUNGS = 16  # thresholds that are tested at most

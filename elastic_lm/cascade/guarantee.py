"""A threshold between Swift and Super with a finite-sample guarantee against the Super alone.

The harm of a threshold t on row i, whose answers have quality a_i (Swift) and b_i (Super) in [0, 1], is

    L_i(t) = max(b_i - a_i, 0) if the Swift keeps the row, else 0

so that E accuracy(t) >= E accuracy(Super) - E L(t): rows that only the Swift gets right are not counted in
its favour. Harm never falls when more rows are kept, and thresholds that were chosen on one half of the
rows are tested on the other, from the most cautious on (Learn-then-Test, see `risk_control`). With
probability at least 1 - epsilon over the testing rows, what passes has E L <= the loss that is allowed.
"""

import dataclasses

import numpy as np

from elastic_lm.bounds import RUNGS, fixed_sequence_test, risk_bound
from elastic_lm.cascade.energy import keeps
from elastic_lm.cascade.sweep import ALWAYS_SUPER, TOLERANCE, Measured, sweep
from elastic_lm.config.cascade import DEFAULT_EPSILON
from elastic_lm.config.checks import require


@dataclasses.dataclass(frozen=True)
class CascadeRisk:
    """What is to be guaranteed."""

    loss: float  # accuracy that may be lost against the Super alone
    epsilon: float = DEFAULT_EPSILON  # probability, over the testing rows, that the guarantee fails

    def __post_init__(self) -> None:
        require(0 < self.loss < 1, "risk.loss", self.loss, "must be an accuracy that may be lost, like 0.01")
        require(0 < self.epsilon < 1, "risk.epsilon", self.epsilon, "must be a probability like 0.05")


@dataclasses.dataclass(frozen=True)
class CascadeGuarantee:
    """What was stated and what the testing rows say about the threshold it holds for."""

    loss: float  # stated accuracy that may be lost
    epsilon: float  # stated probability of failure
    achieved: bool  # False: every row goes to the Super, which satisfies every statement
    statement: str  # the guarantee, or why there is none, in words
    rows: int  # that tested; as many others chose what was tested
    accepted: int  # thresholds that passed, one after the other, of those tested
    tested: int  # thresholds that were tested
    p_value: float  # of "more is lost" for the reported threshold
    harm: float  # mean harm of the testing rows
    harm_bound: float  # upper bound of its expectation, 1 - epsilon, for this threshold alone
    more_rows: int | None = None  # about how many more are needed; None = enough, or no number helps


def harm(rows: Measured, threshold: float) -> np.ndarray:
    """[N] float64 quality in [0, 1] that the Super would have added to rows that the Swift keeps."""
    return np.where(keeps(rows.scores, threshold), np.maximum(rows.super_ - rows.swift, 0.0), 0.0)


def ladder(rows: Measured, loss: float, rungs: int = RUNGS) -> list[float]:
    """Thresholds to test, from the most to the least cautious.

    Args:
      rows: that do not test.
      loss: harm that is allowed.
      rungs: harms on these rows, evenly spaced up to `loss`, that are searched for.

    Returns:
      Distinct thresholds without those that keep no row.
    """
    unharmed = 1.0 - np.maximum(rows.super_ - rows.swift, 0.0)
    curve = sweep(dataclasses.replace(rows, swift=unharmed, super_=np.ones(len(rows))))
    thresholds, suffered = curve.threshold[::-1], 1.0 - curve.accuracy[::-1]
    last = [int(np.flatnonzero(suffered <= loss * (i + 1) / rungs + TOLERANCE)[-1]) for i in range(rungs)]
    return [float(thresholds[i]) for i in sorted(set(last)) if thresholds[i] < ALWAYS_SUPER]


def control(rows: Measured, stated: CascadeRisk, seed: int = 0) -> tuple[float, CascadeGuarantee]:
    """The least cautious threshold that passes.

    Args:
      rows: independent validation rows.
      stated: what is to be guaranteed.
      seed: decides which half of them chooses.

    Returns:
      (threshold, the guarantee). Where nothing passes, every row goes to the Super and the guarantee
      describes the most cautious threshold instead, with the number of rows that would be enough.

    Raises:
      ValueError: there are fewer than two rows.
    """
    require(len(rows) >= 2, "rows", len(rows), "a guarantee needs at least 2: one half chooses, one tests")
    mixed = np.random.default_rng(seed).permutation(len(rows))
    selection, testing = rows.take(mixed[: len(mixed) // 2]), rows.take(mixed[len(mixed) // 2 :])
    verdict = fixed_sequence_test(
        ladder(selection, stated.loss),
        lambda threshold: harm(testing, threshold),
        stated.loss,
        stated.epsilon,
        otherwise=ALWAYS_SUPER,
    )

    suffered = float(verdict.losses.mean())
    # One half of the rows chooses, so that the half that tests grows by every second one.
    more = 2 * verdict.more if verdict.more else None
    achieved, n = verdict.accepted > 0, len(testing)
    guarantee = CascadeGuarantee(
        **dataclasses.asdict(stated),
        achieved=achieved,
        statement=_statement(stated, n) if achieved else _refusal(verdict.tested, more),
        rows=n,
        accepted=verdict.accepted,
        tested=verdict.tested,
        p_value=verdict.p_value,
        harm=suffered,
        harm_bound=risk_bound(suffered, n, stated.epsilon),
        more_rows=more,
    )
    return verdict.chosen, guarantee


def _statement(stated: CascadeRisk, n: int) -> str:
    return (
        f"with probability at least {1 - stated.epsilon:g} over the {n} rows that tested, the expected "
        f"accuracy is at least that of the Super alone minus {stated.loss:g} (for independent rows like "
        "these)"
    )


def _refusal(tested: int, more: int | None) -> str:
    start = "not achievable with these rows, every row goes to the Super: "
    if not tested:
        return start + "the Super gains too much on those that the Swift is surest of"
    if more is None:
        return start + "even the most cautious threshold loses more than is allowed"
    return start + f"about {more} more are needed"

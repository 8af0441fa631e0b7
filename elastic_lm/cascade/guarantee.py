"""A threshold between Swift and Super with a finite-sample guarantee against the Super alone.

The harm of a threshold t on record i, whose answers have quality a_i (Swift) and b_i (Super) in [0, 1], is

    L_i(t) = max(b_i - a_i, 0) if the Swift keeps the record, else 0

so that E accuracy(t) >= E accuracy(Super) - E L(t): records that only the Swift gets right do not count in
its favour. Harm never falls when more records are kept. Thresholds are chosen on one half of the records and
tested on the other, beginning with the most cautious (Learn then Test, arXiv 2110.01052; see `bounds`). With
probability at least 1 - epsilon over the testing records, every threshold that passes has E L <= the loss
that is allowed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from elastic_lm.bounds import RUNGS, fixed_sequence_test, risk_bound
from elastic_lm.cascade.energy import keeps
from elastic_lm.cascade.sweep import ALWAYS_SUPER, TOLERANCE, Measurements, sweep
from elastic_lm.config.checks import require, require_types
from elastic_lm.config.guarantee import DEFAULT_EPSILON

Candidate = TypeVar("Candidate")


@dataclasses.dataclass(frozen=True)
class CascadeRisk:
    """What is to be guaranteed: how much accuracy may be lost, and how often the guarantee may fail.

    Raises:
      ValueError: one of the two is not between 0 and 1.

    Example:
      ```python
      from elastic_lm.cascade import CascadeRisk

      # With 95 % confidence, at most one point of accuracy is lost against the Super alone.
      risk = CascadeRisk(loss=0.01, epsilon=0.05)  # for `MeasuredPair.fit(risk=risk)`
      assert risk.loss == 0.01
      ```
    """

    loss: float  # accuracy that may be lost against the Super alone
    epsilon: float = DEFAULT_EPSILON  # probability, over the testing records, that the guarantee fails

    def __post_init__(self) -> None:
        require_types(self, "risk.")
        require(0 < self.loss < 1, "risk.loss", self.loss, "must be an accuracy that may be lost, like 0.01")
        require(0 < self.epsilon < 1, "risk.epsilon", self.epsilon, "must be a probability like 0.05")


@dataclasses.dataclass(frozen=True)
class CascadeGuarantee:
    """What was stated, and what the testing records say about the threshold that it holds for.

    Example:
      ```python
      import numpy as np
      from elastic_lm.cascade import CascadeRisk, Measurements, fit_rule

      # The Swift is right about the half of 400 records that it is sure of.
      scores = np.linspace(0, 1, 400)
      measurements = Measurements.of(
          scores, swift=scores > 0.5, super_=np.ones(400), cost_swift=1.0, cost_super=10.0
      )
      guarantee = fit_rule(measurements, risk=CascadeRisk(loss=0.05)).guarantee
      assert guarantee.achieved
      print(guarantee.statement)
      ```
    """

    # These fields stand in the files of rules, by these names.
    loss: float  # stated accuracy that may be lost
    epsilon: float  # stated probability of failure
    achieved: bool  # False: every record is passed on to the Super, which satisfies every statement
    statement: str  # the guarantee, or why there is none, in words
    rows: int  # records that tested; as many others chose what was tested
    accepted: int  # thresholds that passed, one after the other
    tested: int  # thresholds that were tested
    p_value: float  # of "more is lost" for the threshold that is reported
    harm: float  # mean harm of the testing records
    harm_bound: float  # upper bound of the expected harm, for this threshold alone, at 1 - epsilon
    more_rows: int | None = None  # about how many more are needed; None = enough, or no number helps


def control(measurements: Measurements, stated: CascadeRisk, seed: int = 0) -> tuple[float, CascadeGuarantee]:
    """Finds the least cautious threshold that passes.

    Args:
      measurements: of independent validation records.
      stated: what is to be guaranteed.
      seed: decides which half of the records chooses.

    Returns:
      (threshold, the guarantee). Where nothing passes, every record is passed on to the Super, and the
      guarantee describes the most cautious threshold instead, with how many more records would be enough.

    Raises:
      ValueError: there are fewer than two records.
    """
    selection, testing = (measurements.take(half) for half in halves(len(measurements), seed))
    return tested(
        ladder(selection, stated.loss),
        lambda threshold: harm(testing, threshold),
        stated,
        len(testing),
        otherwise=ALWAYS_SUPER,
    )


def halves(total: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the records that choose what is tested, and of those that test.

    Args:
      total: records.
      seed: of the draw.

    Raises:
      ValueError: there are fewer than two records.
    """
    require(total >= 2, "records", total, "a guarantee needs at least 2: one half chooses, one tests")
    mixed = np.random.default_rng(seed).permutation(total)
    return mixed[: total // 2], mixed[total // 2 :]


def tested(
    candidates: Sequence[Candidate],
    losses: Callable[[Candidate], np.ndarray],
    stated: CascadeRisk,
    n: int,
    *,
    otherwise: Candidate,
) -> tuple[Candidate, CascadeGuarantee]:
    """Tests candidates in an order that was fixed on other records, and states what passed.

    Args:
      candidates: thresholds, the most cautious first.
      losses: candidate -> [n] float64 harm of the testing records, in [0, 1].
      stated: what is to be guaranteed.
      n: testing records.
      otherwise: the candidate that passes every record on.

    Returns:
      (the last candidate that passed, or `otherwise`; the guarantee).
    """
    verdict = fixed_sequence_test(candidates, losses, stated.loss, stated.epsilon, otherwise=otherwise)
    suffered = float(verdict.losses.mean())
    # One half of the records chooses, so the half that tests grows by every second one.
    more = 2 * verdict.more if verdict.more else None
    achieved = verdict.accepted > 0
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


def harm(measurements: Measurements, threshold: float) -> np.ndarray:
    """[N] float64 quality in [0, 1] that the Super would have added to records that the Swift keeps."""
    m = measurements
    return np.where(keeps(m.scores, threshold), np.maximum(m.super_ - m.swift, 0.0), 0.0)


def ladder(measurements: Measurements, loss: float, rungs: int = RUNGS) -> list[float]:
    """Thresholds to test, from the most to the least cautious.

    Args:
      measurements: of records that do not test.
      loss: harm that is allowed.
      rungs: how many harms on these records, evenly spaced up to `loss`, to find thresholds for.

    Returns:
      Distinct thresholds without those that keep no record.
    """
    # One minus the harm, swept as if it were the Swift's quality and the Super's were perfect.
    unharmed = 1.0 - np.maximum(measurements.super_ - measurements.swift, 0.0)
    perfect = np.ones(len(measurements))
    curve = sweep(dataclasses.replace(measurements, swift=unharmed, super_=perfect))
    thresholds, suffered = curve.threshold[::-1], 1.0 - curve.accuracy[::-1]

    # The least cautious threshold within each share of the loss.
    last = [int(np.flatnonzero(suffered <= loss * (i + 1) / rungs + TOLERANCE)[-1]) for i in range(rungs)]
    return [float(thresholds[i]) for i in sorted(set(last)) if thresholds[i] < ALWAYS_SUPER]


def _statement(stated: CascadeRisk, n: int) -> str:
    return (
        f"with probability at least {1 - stated.epsilon:g} over the {n} records that tested, the expected "
        f"accuracy is at least that of the Super alone minus {stated.loss:g} (for independent records like "
        "these)"
    )


def _refusal(tested: int, more: int | None) -> str:
    start = "not achievable with these records, every record goes to the Super: "
    if not tested:
        return start + "the Super gains too much on those that the Swift is surest of"
    if more is None:
        return start + "even the most cautious threshold loses more than is allowed"
    return start + f"about {more} more are needed"

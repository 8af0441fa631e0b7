"""Bounds and tests of risk against closed forms, their defining properties and simulation."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from elastic_lm.bounds import (
    binomial_tail,
    clopper_pearson,
    fixed_sequence_test,
    hoeffding_bentkus,
    p_value,
    risk_bound,
    sequences_needed,
)
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.guarantee import (
    Guarantee,
    RiskControl,
    control,
    describe,
    ladder,
    sequence_losses,
    token_bound,
)
from elastic_lm.depth.observations import Observations


def guarantee_of(losses: list[np.ndarray], stated: RiskControl) -> Guarantee:
    """What is guaranteed from the losses of candidates, the most cautious first."""
    verdict = fixed_sequence_test(
        range(len(losses)),
        losses.__getitem__,
        stated.allowed,
        stated.epsilon,
        otherwise=-1,
        share=stated.delta,
    )
    return describe(verdict, stated)


def test_hoeffding_bentkus_by_hand() -> None:
    # Without a loss: min((1 - a)^n, e (1 - a)^n).
    assert hoeffding_bentkus(0.0, 20, 0.1) == pytest.approx(0.9**20)
    # r = 0.05, n = 20, a = 0.2: h = .05 ln .25 + .95 ln (.95 / .8) = 0.093946, exp(-20 h) = 0.15275;
    # e P(Bin(20, .2) <= 1) = e (.8^20 + 20 .2 .8^19) = 0.18803.
    assert hoeffding_bentkus(0.05, 20, 0.2) == pytest.approx(0.15275, abs=5e-5)
    assert math.e * binomial_tail(1, 20, 0.2) == pytest.approx(0.18803, abs=5e-5)
    assert hoeffding_bentkus(0.2, 20, 0.2) == 1.0
    assert hoeffding_bentkus(1.0, 20, 0.2) == 1.0


@pytest.mark.parametrize("spread", ["binary", "beta"])
@pytest.mark.parametrize("allowed", [0.02, 0.1, 0.4])
def test_p_values_are_super_uniform_when_the_risk_is_just_too_large(spread: str, allowed: float) -> None:
    rng, n, draws = np.random.default_rng(0), 100, 4000
    if spread == "binary":
        losses = rng.uniform(size=(draws, n)) < allowed
    else:
        losses = rng.beta(2 * allowed, 2 * (1 - allowed), size=(draws, n))
    found = np.asarray([hoeffding_bentkus(r, n, allowed) for r in losses.mean(axis=1)])
    for epsilon in (0.01, 0.05, 0.1, 0.3):
        assert np.mean(found <= epsilon) <= epsilon + 2 * (epsilon * (1 - epsilon) / draws) ** 0.5


def test_token_bound_holds_where_tokens_of_a_sequence_are_alike() -> None:
    """Sequences that are all right or all wrong: the bound over tokens would be far too high."""
    rng, n, length, share, failures = np.random.default_rng(0), 60, 50, 0.8, 0
    for draw in range(200):
        right = np.repeat(rng.uniform(size=n) < share, length)[:, None]
        ones = np.ones((n * length, 1), np.float32)
        seen = Observations(
            layers=(1,),
            n_layers=2,
            confidence=ones,
            agrees=right,
            correct=np.hstack([right, right]),
            nats=np.hstack([ones, ones]),
            weights=ones[:, 0],
            targets=np.zeros(n * length, np.int32),
            sequence=np.repeat(np.arange(n), length),
        )
        failures += token_bound(seen, (0.0,), 0.1, seed=draw) > share
    assert failures / 200 <= 0.1 + 2 * (0.1 * 0.9 / 200) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 10, 50, 1000, 100_000])
@pytest.mark.parametrize("epsilon", [0.001, 0.05, 0.2, 0.9])
def test_at_the_clopper_pearson_bound_so_few_errors_are_just_improbable(n: int, epsilon: float) -> None:
    counts = sorted({0, 1, n // 20, n // 2, n - 1, n})
    found = [clopper_pearson(wrong, n, epsilon) for wrong in counts]
    assert found == sorted(found)
    assert found[-1] == 1.0
    assert found[0] == pytest.approx(1 - epsilon ** (1 / n), abs=1e-11)
    for wrong, bound in zip(counts[:-1], found[:-1], strict=True):
        assert binomial_tail(wrong, n, bound) == pytest.approx(epsilon, rel=1e-4)
        # The other closed form: a quantile of a beta distribution.
        assert bound == pytest.approx(special.betaincinv(wrong + 1, n - wrong, 1 - epsilon), abs=1e-11)


@pytest.mark.parametrize(("wrong", "n"), [(0, 10), (1, 10), (7, 50), (49, 50), (50, 50)])
def test_binomial_tail_is_the_p_value_of_the_exact_test(wrong: int, n: int) -> None:
    for rate in (0.1, 0.5):
        expected = stats.binomtest(wrong, n, rate, alternative="less").pvalue
        assert binomial_tail(wrong, n, rate) == pytest.approx(expected, rel=1e-9)


def test_p_values_fall_with_what_is_allowed_and_with_the_number_of_sequences() -> None:
    allowed = np.linspace(0.001, 0.999, 200)
    for n in (1, 7, 100, 5000):
        for risk in (0.0, 0.003, 0.05, 0.3, 0.9, 1.0):
            found = [hoeffding_bentkus(risk, n, a) for a in allowed]
            assert all(1 >= p >= after >= 0 for p, after in itertools.pairwise(found))
            # Where no less was lost than is allowed, nothing speaks for the statement.
            assert all(p == 1 for p, a in zip(found, allowed, strict=True) if a <= risk)
            # The exponent of Hoeffding's bound is the divergence of two coins, here as a sum of logarithms.
            for p, a in zip(found, allowed, strict=True):
                if 0 < risk < a:
                    h = risk * math.log(risk / a) + (1 - risk) * math.log((1 - risk) / (1 - a))
                    assert p <= math.exp(-n * h) * (1 + 1e-9)
    # With losses of 0 or 1 alone, more sequences with the same share of losses are always better evidence.
    for share in (0.0, 0.1, 0.5):
        found = [hoeffding_bentkus(share, n, 0.6) for n in (10, 20, 50, 200)]
        assert found == sorted(found, reverse=True)


def test_risk_bound_is_where_the_p_value_reaches_epsilon() -> None:
    for risk in (0.0, 0.001, 0.03, 0.5, 0.97):
        for n in (1, 30, 200, 10_000):
            for epsilon in (0.001, 0.05, 0.3):
                bound = risk_bound(risk, n, epsilon)
                assert risk < bound <= 1
                assert bound == 1 or hoeffding_bentkus(risk, n, bound) <= epsilon
                assert hoeffding_bentkus(risk, n, bound - 2e-9) > epsilon
    assert risk_bound(0.0, 30, 0.05) == pytest.approx(1 - 0.05 ** (1 / 30))
    assert risk_bound(1.0, 30, 0.05) == 1.0


def test_sequences_needed() -> None:
    assert sequences_needed(0.0, 0.01, 0.05) == 299  # 0.99^299 < 0.05 < 0.99^298
    assert sequences_needed(0.1, 0.1, 0.05) is None
    assert sequences_needed(0.2, 0.1, 0.05) is None
    assert sequences_needed(0.0999999, 0.1, 0.05, most=10**6) is None
    counts = [sequences_needed(risk, 0.1, 0.05) for risk in (0.0, 0.02, 0.05, 0.08)]
    assert counts == sorted(counts, key=lambda c: c or 0)
    for risk, count in zip((0.0, 0.02, 0.05, 0.08), counts, strict=True):
        assert count is not None
        assert hoeffding_bentkus(risk, count, 0.1) <= 0.05


def test_candidates_are_tested_up_to_the_first_failure() -> None:
    losses = {"a": np.zeros(100), "b": np.full(100, 0.01), "c": np.full(100, 0.3), "d": np.zeros(100)}
    asked = []

    def loss(name: str) -> np.ndarray:
        asked.append(name)
        return losses.get(name, np.zeros(100))

    found = fixed_sequence_test("abcd", loss, 0.1, 0.05, otherwise="none")
    assert asked == ["a", "b", "c"]
    assert (found.chosen, found.described, found.accepted, found.tested) == ("b", "b", 2, 3)
    assert found.p_value == hoeffding_bentkus(0.01, 100, 0.1)
    assert found.more is None

    refused = fixed_sequence_test("cab", loss, 0.1, 0.05, otherwise="none")
    assert (refused.chosen, refused.described, refused.accepted, refused.tested) == ("none", "c", 0, 1)
    assert refused.p_value == 1.0
    assert refused.more is None  # more sequences like these would not help

    empty = fixed_sequence_test("", loss, 0.1, 0.05, otherwise="none")
    assert (empty.chosen, empty.described, empty.accepted, empty.tested) == ("none", "none", 0, 0)


def test_where_none_passes_it_says_how_many_losses_are_missing() -> None:
    losses = np.full(20, 0.01)
    found = fixed_sequence_test([0], lambda _: losses, 0.1, 0.05, otherwise=1)
    assert found.more is not None
    assert p_value(np.full(20 + found.more, 0.01), 0.1) <= 0.05
    # A second statement may need more than the first.
    both = fixed_sequence_test([0], lambda _: losses, 0.1, 0.05, otherwise=1, share=0.01)
    assert both.more == 299 - 20


def observations(agrees: list[list[bool]]) -> Observations:
    """One exit after layer 1 of 2, always sure, and its agreement per sequence and token."""
    flat = np.asarray([x for row in agrees for x in row])[:, None]
    n = len(flat)
    sequence = np.repeat(np.arange(len(agrees)), [len(row) for row in agrees])
    zeros = np.zeros((n, 2), np.float32)
    return Observations(
        (1,), 2, np.ones((n, 1), np.float32), flat, zeros > 0, zeros, zeros[:, 0], sequence, sequence
    )


def test_loss_of_a_sequence_is_its_share_of_other_tokens() -> None:
    seen = observations([[True, False], [True, True, True, False], [True]])
    np.testing.assert_allclose(sequence_losses(seen, (1.0,)), [0.5, 0.25, 0.0])
    np.testing.assert_allclose(sequence_losses(seen, (NEVER_EXITS,)), [0.0, 0.0, 0.0])


def test_with_delta_both_statements_are_tested() -> None:
    losses = np.append(np.zeros(95), np.ones(5))
    marginal = p_value(losses, 0.2)
    assert marginal == hoeffding_bentkus(0.05, 100, 0.2)
    assert p_value(losses, 0.2, 0.1) == pytest.approx(stats.binom.cdf(5, 100, 0.1))
    assert p_value(losses, 0.2, 0.9) == marginal


def test_a_loss_equal_to_what_is_allowed_is_not_below_the_target() -> None:
    losses = np.full(100, 1 - 0.8)  # not exactly 0.2 in binary
    assert guarantee_of([losses], RiskControl(0.8, 0.05, 0.1)).below == 0.0


def test_figures_of_a_guarantee_by_hand() -> None:
    cautious, bold = np.zeros(200), np.append(np.zeros(180), np.full(20, 0.5))
    bolder = np.append(np.zeros(100), np.ones(100))
    found = guarantee_of([cautious, bold, bolder, bold], RiskControl(0.85, 0.05, 0.2))
    assert found.achieved
    assert (found.accepted, found.tested) == (2, 3)
    assert found.agreement == pytest.approx(0.95)
    assert found.below == pytest.approx(0.1)
    assert found.below_bound == pytest.approx(clopper_pearson(20, 200, 0.05))
    assert found.worst_decile == pytest.approx(0.5)
    assert found.agreement_bound >= 0.85
    assert found.more_sequences is None
    assert "0.95" in found.statement
    assert "at least 0.85" in found.statement
    assert "share 0.2" in found.statement


def test_not_achievable() -> None:
    few = guarantee_of([np.zeros(20)], RiskControl(0.99, 0.05))
    assert not few.achieved
    assert few.more_sequences == 2 * (299 - 20)
    assert "about 558 more sequences" in few.statement
    bad = guarantee_of([np.full(50, 0.5)], RiskControl(0.9, 0.05))
    assert bad.more_sequences is None
    assert "even the most cautious" in bad.statement
    seen = observations([[False] * 4] * 40)
    thresholds, guarantee = control(*seen.halves(), RiskControl(0.9, 0.05))
    assert thresholds == (NEVER_EXITS,)
    assert guarantee.tested == 0
    assert "no exit agrees" in guarantee.statement


def test_ladder_runs_from_caution_to_the_target() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=(2000, 2)).astype(np.float32)
    agrees = rng.uniform(size=confidence.shape) < confidence
    zeros, sequence = np.zeros((2000, 3), np.float32), np.arange(2000) // 10
    seen = Observations((1, 2), 4, confidence, agrees, zeros > 0, zeros, zeros[:, 0], sequence, sequence)
    rungs = ladder(seen, (0, 1), RiskControl(0.8))
    risks = [sequence_losses(seen, thresholds).mean() for thresholds in rungs]
    assert risks == sorted(risks)
    assert len(set(rungs)) == len(rungs) == 16
    assert risks[-1] == pytest.approx(0.2, abs=0.005)
    assert all(thresholds[0] == NEVER_EXITS for thresholds in ladder(seen, (1,), RiskControl(0.8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 1.0}, "target=1.0"),
        ({"target": 0.0}, "target=0.0"),
        ({"epsilon": 1.0}, "epsilon=1.0"),
        ({"delta": 0.0}, "delta=0.0"),
    ],
)
def test_statements_out_of_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RiskControl(0.9, 0.05, 0.1), **change)
    with pytest.raises(ValueError, match="allowed=0"):
        hoeffding_bentkus(0.1, 5, 0)
    with pytest.raises(ValueError, match="n=0"):
        hoeffding_bentkus(0.1, 0, 0.1)
    with pytest.raises(ValueError, match="wrong=3"):
        clopper_pearson(3, 2, 0.1)

"""Per-exit strategies on tokens small enough to do by hand."""

from typing import Any

import numpy as np
import pytest

from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.per_exit import Strategy, exit_threshold, exit_thresholds, platt

CONFIDENCE = 1 - np.array([0.1, 0.2, 0.3, 0.4])
AGREES = np.array([True, False, True, True])  # cumulative 1, 1/2, 2/3, 3/4


def test_golden() -> None:
    most = exit_threshold(CONFIDENCE, AGREES, 0.75, "max_coverage")
    assert 1 - most.threshold == pytest.approx(0.4)
    assert most.coverage == 1.0
    assert most.agreement == 0.75
    least = exit_threshold(CONFIDENCE, AGREES, 0.75, "min_coverage")
    assert 1 - least.threshold == pytest.approx(0.1)
    assert least.coverage == 0.25
    # The order of the tokens does not matter.
    mixed = [2, 0, 3, 1]
    assert exit_threshold(CONFIDENCE[mixed], AGREES[mixed], 0.75) == most


def test_midpoint_lies_half_way_to_the_next_token() -> None:
    found = exit_threshold(CONFIDENCE, AGREES, 0.9, "midpoint")
    assert 1 - found.threshold == pytest.approx(0.15)
    assert found.coverage == 0.25
    last = exit_threshold(CONFIDENCE, AGREES, 0.75, "midpoint")
    assert 1 - last.threshold == pytest.approx(0.4)


@pytest.mark.parametrize("strategy", ["max_coverage", "min_coverage", "midpoint", "platt"])
def test_never_where_none_is_valid(strategy: Strategy) -> None:
    found = exit_threshold(CONFIDENCE, np.zeros(4, bool), 0.75, strategy)
    assert (found.threshold, found.coverage, found.agreement) == (NEVER_EXITS, 0.0, 1.0)


def test_equal_confidences_exit_together() -> None:
    confidence, agrees = np.array([0.9, 0.9, 0.5]), np.array([True, False, True])
    assert exit_threshold(confidence, agrees, 0.9).threshold == NEVER_EXITS
    assert exit_threshold(confidence, agrees, 0.6).threshold == 0.5
    assert exit_threshold(confidence, agrees, 0.5, "min_coverage").threshold == 0.9


def test_platt_recovers_a_logistic_curve() -> None:
    rng = np.random.default_rng(0)
    uncertainty = rng.uniform(size=20_000)
    agrees = rng.uniform(size=20_000) < 1 / (1 + np.exp(8 * uncertainty - 4))
    w, b = platt(uncertainty, agrees)
    assert w == pytest.approx(-8, abs=0.3)
    assert b == pytest.approx(4, abs=0.2)
    found = exit_threshold(1 - uncertainty, agrees, 0.9, "platt")
    assert 1 - found.threshold == pytest.approx((4 - np.log(9)) / 8, abs=0.02)


@pytest.mark.parametrize("kind", ["noisy", "separated", "all right"])
@pytest.mark.parametrize("n", [5, 200, 20_000])
def test_platt_is_where_the_likelihood_has_no_slope(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    scores = rng.uniform(size=n)
    labels = {"noisy": rng.uniform(size=n) < scores, "separated": scores > 0.4, "all right": scores >= 0}[
        kind
    ]
    w, b = platt(scores, labels)
    positive = labels.sum()
    wanted = np.where(labels, (positive + 1) / (positive + 2), 1 / (n - positive + 2))
    residual = 1 / (1 + np.exp(-(w * scores + b))) - wanted
    assert abs(residual.sum()) < 1e-6
    assert abs(residual @ scores) < 1e-6


def test_platt_stays_within_the_tokens() -> None:
    confidence = np.linspace(0.2, 0.9, 50)
    assert exit_threshold(confidence, np.ones(50, bool), 0.5, "platt").threshold == pytest.approx(0.2)
    separated = exit_threshold(confidence, confidence > 0.5, 0.5, "platt")
    assert separated.threshold == pytest.approx(0.5, abs=0.03)
    assert exit_threshold(confidence, np.ones(50, bool), 1.0, "platt").threshold == NEVER_EXITS


def test_every_exit_on_its_own() -> None:
    confidence = np.column_stack([CONFIDENCE, CONFIDENCE[::-1]])
    agrees = np.column_stack([AGREES, np.zeros(4, bool)])
    assert exit_thresholds(confidence, agrees, 0.75) == pytest.approx((0.6, NEVER_EXITS))


def test_messages() -> None:
    unknown: Any = "best"
    with pytest.raises(ValueError, match="target=0"):
        exit_threshold(CONFIDENCE, AGREES, 0)
    with pytest.raises(ValueError, match=r"strategy='best'.*max_coverage"):
        exit_threshold(CONFIDENCE, AGREES, 0.5, unknown)
    with pytest.raises(ValueError, match="at least one token"):
        exit_threshold(CONFIDENCE[:0], AGREES[:0], 0.5)

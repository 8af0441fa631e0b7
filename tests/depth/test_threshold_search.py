"""Threshold search on synthetic tokens with known answers."""

import itertools

import numpy as np
import pytest

from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.threshold_search import choose_thresholds, emitting_exit, exit_outcome

DEPTHS = (2, 4, 8)


def synthetic(n: int, seed: int = 0, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Two calibrated exits: a token with confidence c agrees with probability c; the second is surer."""
    random = np.random.default_rng(seed)
    ease = random.normal(size=(n, 1))
    scores = ease + np.array([0.5, 1.5]) + 0.5 * random.normal(size=(n, 2))
    confidence = (1 / (1 + np.exp(-sharpness * scores))).astype(np.float32)
    return confidence, random.uniform(size=(n, 2)) < confidence


def test_first_confident_exit_emits_and_ties_exit() -> None:
    confidence = np.array([[0.5, 0.9], [0.4, 0.7], [0.4, 0.6], [0.9, 0.1]], np.float32)
    assert emitting_exit(confidence, (0.5, 0.7)).tolist() == [0, 1, 2, 0]
    assert emitting_exit(confidence, (0.0, 0.0)).tolist() == [0, 0, 0, 0]
    assert emitting_exit(confidence, (NEVER_EXITS, NEVER_EXITS)).tolist() == [2, 2, 2, 2]
    assert emitting_exit(confidence, (NEVER_EXITS, 0.0)).tolist() == [1, 1, 1, 1]


def test_outcome_by_hand() -> None:
    confidence = np.array([[0.9, 0.0], [0.1, 0.9], [0.1, 0.1], [0.9, 0.9]], np.float32)
    agrees = np.array([[True, False], [True, False], [False, False], [False, True]])
    result = exit_outcome(confidence, agrees, DEPTHS, (0.5, 0.5))
    assert result.agreement == 0.5  # tokens 0 and 2
    assert result.mean_layers == (2 + 4 + 8 + 2) / 4
    assert result.shares == (0.5, 0.25, 0.25)


def test_known_answer() -> None:
    # Exit 1 is right exactly where its confidence is at least 0.6; exit 2 is always right.
    first = np.linspace(0, 1, 101, dtype=np.float32)
    confidence = np.column_stack([first, np.full(101, 0.3, np.float32)])
    agrees = np.column_stack([first >= 0.6, np.ones(101, bool)])
    chosen = choose_thresholds(confidence, agrees, DEPTHS, (1.0,))
    assert chosen[1.0] == pytest.approx((0.6, 0.3))
    # With a budget of ten disagreements exit 1 takes exactly ten tokens more.
    chosen = choose_thresholds(confidence, agrees, DEPTHS, (1 - 10 / 101,))
    assert chosen[1 - 10 / 101] == pytest.approx((0.5, 0.3))


def test_equal_confidences_exit_together() -> None:
    confidence = np.full((10, 1), 0.7, np.float32)
    agrees = np.arange(10)[:, None] != 0
    chosen = choose_thresholds(confidence, agrees, (2, 8), (0.95, 0.9))
    assert chosen[0.95] == (NEVER_EXITS,)  # nine of ten would do, but the tenth has the same confidence
    assert chosen[0.9] == pytest.approx((0.7,))


def test_budget_is_kept_and_layers_grow_with_the_target() -> None:
    confidence, agrees = synthetic(3000)
    targets = (0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)
    chosen = choose_thresholds(confidence, agrees, DEPTHS, targets)
    results = [exit_outcome(confidence, agrees, DEPTHS, chosen[t]) for t in targets]
    assert all(r.agreement >= t for r, t in zip(results, targets, strict=True))
    layers = [r.mean_layers for r in results]
    assert layers == sorted(layers)
    assert layers[0] < layers[-1]


@pytest.mark.parametrize("seed", range(4))
def test_close_to_brute_force_and_better_than_one_shared_threshold(seed: int) -> None:
    confidence, agrees = synthetic(150, seed)
    target = 0.9

    def layers(thresholds: tuple[float, ...]) -> float:
        result = exit_outcome(confidence, agrees, DEPTHS, thresholds)
        return result.mean_layers if result.agreement >= target - 1e-9 else np.inf

    options = [np.append(np.unique(confidence[:, j]), NEVER_EXITS) for j in range(2)]
    best = min(layers(pair) for pair in itertools.product(*options))
    shared = min(layers((t, t)) for t in np.append(np.unique(confidence), NEVER_EXITS))
    found = layers(choose_thresholds(confidence, agrees, DEPTHS, (target,))[target])
    assert best <= found <= best * 1.02
    assert found <= shared


def test_the_number_of_prices_hardly_matters() -> None:
    confidence, agrees = synthetic(3000)
    targets = (0.8, 0.95, 0.99)
    few, many = (choose_thresholds(confidence, agrees, DEPTHS, targets, prices=p) for p in (12, 64))
    for target in targets:
        first, second = (exit_outcome(confidence, agrees, DEPTHS, c[target]).mean_layers for c in (few, many))
        assert first == pytest.approx(second, rel=0.005)

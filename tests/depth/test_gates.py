"""Gates are calibrated beside the thresholds, and what they silence is in the figures."""

import dataclasses

import jax
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.calibration import calibrate, choose_gates, fit_thresholds
from elastic_lm.depth.observations import Observations, observe
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.depth.threshold_search import exit_outcome
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params
from elastic_lm.testing import random_tokens, tiny_config


def tokens(seed=0, n=8000):
    """An exit whose confidence tells when it is right, and a gate that nearly knows the confidence."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(size=n).astype(np.float32)
    gate = np.clip(sure + 0.05 * rng.normal(size=n), 0.01, 0.99).astype(np.float32)
    agrees = rng.uniform(size=n) < 0.5 + 0.5 * sure
    zeros = np.zeros((n, 2), np.float32)
    return Observations(
        layers=(3,),
        n_layers=6,
        confidence=sure[:, None],
        agrees=agrees[:, None],
        correct=zeros > 0,
        nats=zeros,
        weights=np.ones(n, np.float32),
        targets=np.zeros(n, np.int32),
        sequence=np.repeat(np.arange(n // 40), 40),
        gate=gate[:, None],
    )


def test_gates_keep_what_would_leave_and_shut_out_the_rest():
    seen = tokens()
    policy = fit_thresholds(seen, target=0.97, metric="max_prob", targets=())
    (gate,) = policy.gates
    leaves = seen.confidence[:, 0] >= policy.thresholds[0]
    assert np.mean(seen.gate[leaves, 0] >= gate) > 0.96
    assert np.mean(seen.gate[~leaves, 0] < gate) > 0.8  # heads that are not read for nothing


def test_figures_count_tokens_that_a_gate_held_back():
    seen = tokens()
    policy = fit_thresholds(seen, target=0.97, metric="max_prob", targets=())
    scoring = seen.halves(0)[1]
    gated = scoring.gated(policy.gates)
    with_gates = exit_outcome(gated.confidence, scoring.agrees, (3, 6), policy.thresholds)
    without = exit_outcome(scoring.confidence, scoring.agrees, (3, 6), policy.thresholds)
    assert policy.measured.mean_layers == pytest.approx(with_gates.mean_layers)
    assert with_gates.mean_layers > without.mean_layers
    assert policy.measured.agreement > 0.96


@pytest.mark.parametrize("strategy", ["joint", "midpoint", "platt"])
def test_silenced_tokens_are_no_thresholds(strategy):
    """An exit that is right nearly always, whose gate says little: every threshold can be lived with."""
    rng = np.random.default_rng(0)
    seen = tokens()
    right = rng.uniform(size=seen.agrees.shape) < 0.97
    gate = rng.uniform(0.2, 0.8, size=seen.gate.shape).astype(np.float32)
    seen = dataclasses.replace(seen, agrees=right, gate=gate)
    for target in (0.9, 0.99):
        policy = fit_thresholds(seen, target=target, metric="max_prob", strategy=strategy)
        shut = seen.halves(0)[1].gate[:, 0] < (policy.gates or (0.0,))[0]
        for point in policy.curve:
            assert min(point.thresholds) >= 0
            assert policy.at(point.target).thresholds == point.thresholds
            assert point.shares[0] <= 1 - shut.mean() + 1e-9


def test_heads_are_read_where_the_gate_opens():
    seen = tokens()
    policy = fit_thresholds(seen, target=0.97, metric="max_prob", targets=())
    opens = np.mean(seen.halves(0)[1].gate[:, 0] >= policy.gates[0])
    assert policy.measured.looked == (pytest.approx(opens),)
    assert policy.measured.shares[0] < opens < 0.9


def test_a_policy_with_gates_needs_a_model_with_gates():
    config = tiny_config(n_layers=3).with_exits((ExitConfig(1, "norm"),))
    with pytest.raises(ValueError, match=r"after layers \[1\] have none"):
        ConfidenceExit("max_prob", (0.5,), (1,), gates=(0.9,)).check(config)
    with pytest.raises(ValueError, match=r"gates=\(nan,\): must be finite"):
        ConfidenceExit("max_prob", (0.5,), (1,), gates=(float("nan"),))


def test_exits_without_gates_have_no_gates_to_calibrate(tmp_path):
    seen = tokens()
    bare = seen.__class__(**{**vars(seen), "gate": None})
    assert choose_gates(bare, [0], (3, 6), 0.97) == (0.0,)
    policy = fit_thresholds(bare, target=0.97, metric="max_prob")
    assert policy.gates == ()
    policy.save(tmp_path / "t.json")
    assert ConfidenceExit.load(tmp_path / "t.json") == policy


def test_gates_are_observed_and_saved(tmp_path):
    config = tiny_config(n_layers=3).with_exits((ExitConfig(1, "norm", gate=4), ExitConfig(2, "norm")))
    params = init_params(config, jax.random.key(0))
    ids = random_tokens(config, 6, 16)
    ones = np.ones((6, 16))
    positions = np.broadcast_to(np.arange(16), (6, 16))
    batch = Batch(ids, ids, ones.astype(np.float32), positions, ones.astype(np.int32))
    seen = observe(config, params, [batch])
    decoder = Decoder(config).bind({"params": params})
    expected = decoder.exit_gate(0, decoder.exit_features(0, decoder.taps(ids, [1])[1]))
    np.testing.assert_allclose(seen.gate[:, 0], np.asarray(expected).ravel(), rtol=1e-5)
    assert not seen.gate[:, 1].any()
    policy = calibrate(config, params, [batch], target=0.5)
    policy.save(tmp_path / "t.json")
    assert ConfidenceExit.load(tmp_path / "t.json").gates == policy.gates


def test_wrong_numbers_of_gates_are_named():
    with pytest.raises(ValueError, match=r"gates=\(0.5,\): needs one per exit"):
        ConfidenceExit("max_prob", (0.5, 0.5), (1, 2), gates=(0.5,))

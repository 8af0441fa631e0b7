"""Observing held-out text: the same numbers as whole logits give, in one compiled program."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.calibration import calibrate
from elastic_lm.depth.confidence import LOGIT_METRICS, confidence, state_similarity
from elastic_lm.depth.observations import observe, observe_batch
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.models.decoder import Decoder, Params, stack_layers
from elastic_lm.models.registry import abstract_params
from elastic_lm.testing import random_tokens, tiny_config

EXITS = (ExitConfig(1, "mlp"), ExitConfig(3, "norm", tied=True, temperature=2.0))
CONFIG = tiny_config().with_exits(EXITS)


@pytest.fixture(scope="module")
def params() -> Params:
    random = np.random.default_rng(0)
    shapes = nn.unbox(abstract_params(CONFIG))
    return jax.tree.map(lambda p: jnp.asarray(random.normal(0, 0.3, p.shape), p.dtype), shapes)


def batch(rows: int, length: int = 10, seed: int = 0) -> Batch:
    tokens = random_tokens(CONFIG, rows, length, seed)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    weights = jnp.ones(tokens.shape).at[:, -3:].set(0.0)
    targets = random_tokens(CONFIG, rows, length, seed + 100)
    return Batch(tokens, targets, weights, positions, jnp.ones_like(tokens))


@pytest.mark.parametrize("metric", LOGIT_METRICS)
def test_matches_whole_logits(params: Params, metric: str) -> None:
    data = batch(4)
    seen = observe(CONFIG, params, [data], metric=metric, chunk=4)
    output = jax.jit(lambda p, t: Decoder(CONFIG).bind({"params": p})(t))(params, data.tokens)
    counted = np.asarray(data.weights) > 0
    best = np.argmax(output.logits, -1)
    assert seen.layers == (1, 3)
    assert seen.tokens == 4 * 7
    for i, logits in enumerate(output.exit_logits):
        expected = np.asarray(confidence(metric, logits))[counted]
        np.testing.assert_allclose(seen.confidence[:, i], expected, rtol=1e-4, atol=1e-6)
        assert np.array_equal(seen.agrees[:, i], (np.argmax(logits, -1) == best)[counted])
    for i, logits in enumerate((*output.exit_logits, output.logits)):
        log_p = jax.nn.log_softmax(logits)
        nats = -np.take_along_axis(np.asarray(log_p), np.asarray(data.targets)[..., None], -1)[..., 0]
        np.testing.assert_allclose(seen.nats[:, i], nats[counted], rtol=1e-4)
        assert np.array_equal(seen.correct[:, i], (np.argmax(logits, -1) == data.targets)[counted])
    assert np.array_equal(seen.sequence, np.repeat(np.arange(4), 7))
    assert np.array_equal(seen.targets, np.asarray(data.targets)[counted])


def gated() -> tuple[ModelConfig, Params]:
    """The model with a gate on every exit, and random parameters."""
    config = CONFIG.with_exits(tuple(dataclasses.replace(e, gate=5) for e in EXITS))
    random = np.random.default_rng(1)
    shapes = nn.unbox(abstract_params(config))
    return config, jax.tree.map(lambda p: jnp.asarray(random.normal(0, 0.3, p.shape), p.dtype), shapes)


@pytest.mark.parametrize("metric", ["cosine", "learned"])
@pytest.mark.parametrize("stacked", [False, True])
def test_matches_states_and_gates(metric: str, stacked: bool) -> None:
    config, params = gated()
    data = batch(3)
    seen = observe(config, stack_layers(params) if stacked else params, [data], metric=metric, chunk=4)

    @jax.jit
    def expected(params: Params, tokens: jax.Array) -> list[jax.Array]:
        decoder = Decoder(config).bind({"params": params})
        taps = decoder.taps(tokens, (1, 2, 3))
        if metric == "cosine":
            entering = {1: taps[1].entering, 3: taps[2].hidden}
            return [state_similarity(taps[layer].hidden, entering[layer]) for layer in (1, 3)]
        features = [decoder.exit_features(i, taps[layer]) for i, layer in enumerate((1, 3))]
        return [decoder.exit_gate(i, x) for i, x in enumerate(features)]

    counted = np.asarray(data.weights) > 0
    for i, values in enumerate(expected(params, data.tokens)):
        np.testing.assert_allclose(seen.confidence[:, i], np.asarray(values)[counted], rtol=1e-4, atol=1e-6)
    assert len(np.unique(seen.confidence)) > 10


def test_learned_needs_gates(params: Params) -> None:
    with pytest.raises(ValueError, match=r"metric='learned': the exits after layers \(1, 3\) have no gate"):
        calibrate(CONFIG, params, [batch(4)], metric="learned")
    policy = ConfidenceExit("learned", (0.5, 0.5), (1, 3))
    policy.check(gated()[0])
    with pytest.raises(ValueError, match=r"ExitConfig\(gate=width\)"):
        policy.check(CONFIG)


def test_one_program_for_all_batches_metrics_and_a_short_last_one(params: Params) -> None:
    observe_batch.clear_cache()
    whole = observe(CONFIG, params, [batch(3, seed=1), batch(3, seed=2)])
    ragged = jax.tree.map(lambda x: x[:2, :8], batch(3, seed=2))
    parts = observe(CONFIG, params, [batch(3, seed=1), ragged])
    observe(CONFIG, params, [batch(3)], metric="entropy")
    assert observe_batch._cache_size() == 1
    assert parts.tokens == 3 * 7 + 2 * 7
    keep = np.isin(whole.sequence, [0, 1, 2, 3, 4])
    assert np.array_equal(parts.sequence, whole.sequence[keep])
    np.testing.assert_allclose(parts.confidence, whole.confidence[keep], rtol=1e-5)


def test_stacked_parameters(params: Params) -> None:
    first, second = observe(CONFIG, params, [batch(2)]), observe(CONFIG, stack_layers(params), [batch(2)])
    np.testing.assert_allclose(first.nats, second.nats, rtol=1e-4, atol=1e-5)


def test_only_scalars_leave_the_device(params: Params) -> None:
    result = jax.eval_shape(lambda: observe_batch(CONFIG, params, batch(2), jnp.int32(0), 4))
    assert max(x.size for x in jax.tree.leaves(result)) == 2 * 10 * 3


def test_memory_of_logits_is_one_chunk(params: Params) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=32768)
    shapes = nn.unbox(abstract_params(config))
    data = jax.eval_shape(lambda: batch(2, 128))
    program = observe_batch.lower(config, shapes, data, jnp.int32(0), 4).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 128 * 32768 * 4 / 2


def test_messages(params: Params) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 10\): larger than the first one, \(2, 10\)"):
        observe(CONFIG, params, [batch(2), batch(3)])
    with pytest.raises(ValueError, match="without a counted token"):
        observe(CONFIG, params, [])
    with pytest.raises(ValueError, match="attach and tune exits first"):
        calibrate(tiny_config(), params, [])
    with pytest.raises(ValueError, match="at least 2 are needed"):
        calibrate(CONFIG, params, [jax.tree.map(lambda x: x[:1], batch(2))])


def test_calibrate_records_where_thresholds_come_from(params: Params, tmp_path: Path) -> None:
    policy = calibrate(
        CONFIG, params, [batch(4, seed=i) for i in range(3)], target=0.9, model="some/folder", data="noise"
    )
    policy.save(tmp_path / "thresholds.json")
    loaded = ConfidenceExit.load(tmp_path / "thresholds.json")
    loaded.check(CONFIG)
    recorded = loaded.provenance
    assert recorded["model"]["path"] == "some/folder"
    assert recorded["model"]["n_layers"] == 4
    assert recorded["data"]["description"] == "noise"
    assert recorded["data"]["selection_tokens"] + recorded["data"]["scoring_tokens"] == 3 * 4 * 7
    assert recorded["data"]["sequences"] == 12
    assert "jax" in recorded["versions"]
    assert recorded["guarantee"].startswith("none")
    other = ModelConfig(**{**vars(CONFIG), "d_model": 64, "head_dim": 16})
    with pytest.raises(ValueError, match="d_model=32"):
        loaded.check(other)


def test_rows_longer_than_the_model_are_refused(params: Params) -> None:
    short = dataclasses.replace(CONFIG, max_len=8)
    with pytest.raises(ValueError, match=r"seq_len=10: above max_len=8"):
        observe(short, params, [batch(2)])

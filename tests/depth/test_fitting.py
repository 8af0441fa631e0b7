"""Exits in closed form: the regression's solution, whatever the batches, and exact where it can be."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.config.model import ExitConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.cached_taps import read_taps
from elastic_lm.depth.fitting import fit_exits
from elastic_lm.models.decoder import Decoder, stack_layers
from elastic_lm.models.exits import attach_exits
from elastic_lm.testing import random_params, random_tokens, tiny_config

ROWS, LENGTH = 8, 32


def batch_of(config, seed, padded=0):
    tokens = random_tokens(config, batch=ROWS, length=LENGTH + 1, seed=seed)
    ones = jnp.ones((ROWS, LENGTH), jnp.int32)
    weights = ones.astype(jnp.float32).at[:, LENGTH - padded :].set(0.0)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, jnp.cumsum(ones, 1) - 1, ones)


def attached(kind, norm="rmsnorm", init="fit", hidden=0, **sizes):
    config = tiny_config(n_layers=3, norm=norm, **sizes)
    params = random_params(config, scale=0.3)
    exit_config = ExitConfig(1, kind, tied=True, init=init, hidden=hidden)
    return attach_exits(config, params, [exit_config], jax.random.key(1))


def features_of(config, params, batch):
    """(exit's features, full model's) of the counted tokens."""
    decoder = Decoder(config).bind({"params": params})
    taps = decoder.taps(batch.tokens, (1, 3), batch.positions, batch.segments)
    exits = decoder.exit_features(0, taps[1], batch.positions, batch.segments)
    counted = np.asarray(batch.weights) > 0
    return np.asarray(exits)[counted], np.asarray(decoder.final_features(taps[3].hidden))[counted]


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("norm_offset", [0.0, 1.0])
def test_a_copied_map_is_the_copied_norm(norm, norm_offset):
    batch = None
    found = []
    for kind, hidden in (("norm", 0), ("linear", 0), ("linear", 8)):
        config, params = attached(kind, norm, init="copy", hidden=hidden, norm_offset=norm_offset)
        batch = batch or batch_of(config, 0)
        found.append(features_of(config, params, batch)[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_the_map_is_the_ridge_regression(norm):
    """Against NumPy's least squares on rows that carry the penalty."""
    config, params = attached("linear", norm)
    batches = [batch_of(config, seed, padded=5 * seed) for seed in range(3)]
    ridge = 0.05
    fitted = fit_exits(config, params, batches, ridge=ridge)

    identity = dataclasses.replace(config, exits=(ExitConfig(1, "norm", tied=True),))
    plain = {"scale": jnp.ones(config.d_model)} | (
        {"bias": jnp.zeros(config.d_model)} if norm == "layernorm" else {}
    )
    pairs = [features_of(identity, {**params, "exit_1": {"norm": plain}}, batch) for batch in batches]
    u, f = (np.concatenate(part).astype(np.float64) for part in zip(*pairs, strict=True))
    u1 = np.concatenate([u, np.ones((len(u), 1))], axis=1)
    penalty = np.sqrt(ridge * np.mean(u**2) * len(u)) * np.eye(config.d_model, config.d_model + 1)
    solution, *_ = np.linalg.lstsq(
        np.concatenate([u1, penalty]), np.concatenate([f, np.zeros_like(penalty[:, :-1])]), rcond=None
    )
    np.testing.assert_allclose(fitted["exit_1"]["map"]["kernel"], solution[:-1].T, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(fitted["exit_1"]["map"]["bias"], solution[-1], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["norm", "linear", "mlp", "block"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_fit_comes_closer_than_the_copy_on_other_text(kind, norm):
    config, params = attached(kind, norm)
    fitted = fit_exits(config, params, [batch_of(config, seed) for seed in range(12)])
    other = batch_of(config, 99)
    (before, full), (after, _) = (features_of(config, p, other) for p in (params, fitted))
    assert np.mean((after - full) ** 2) < np.mean((before - full) ** 2)
    assert fitted["layers_0"] is params["layers_0"]


def test_the_map_gives_what_the_mlp_beside_it_leaves():
    """Least squares with a free constant leave nothing of the mean, and nothing that u could predict."""
    config, params = attached("linear", init="random", hidden=8)
    down = params["exit_1"]["mlp"]["down"]["kernel"]
    params["exit_1"]["mlp"]["down"]["kernel"] = jax.random.normal(jax.random.key(2), down.shape)
    batch = batch_of(config, 0)
    features, full = features_of(config, fit_exits(config, params, [batch], ridge=1e-6), batch)
    np.testing.assert_allclose(np.mean(full - features, axis=0), 0, atol=1e-3)
    assert np.sum((features - full) ** 2) < np.sum((full - full.mean(axis=0)) ** 2)


def test_an_exit_after_the_last_layer_is_fitted_exactly():
    config = tiny_config(n_layers=2, norm="layernorm")
    exit_config = ExitConfig(2, "linear", tied=True, init="fit")
    config, params = attach_exits(config, random_params(config, scale=0.3), [exit_config], jax.random.key(0))
    batches = [batch_of(config, seed) for seed in range(4)]
    fitted = fit_exits(config, params, batches, ridge=1e-6)
    output = Decoder(config).apply({"params": fitted}, batches[0].tokens)
    np.testing.assert_allclose(output.exit_logits[0], output.logits, atol=1e-3)


def test_sums_do_not_depend_on_how_text_is_cut_nor_on_stacking():
    config, params = attached("linear")
    whole = batch_of(config, 3)
    halves = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], whole) for i in (0, 1)]
    one = fit_exits(config, params, [whole], ridge=0.01)["exit_1"]["map"]["kernel"]
    two = fit_exits(config, params, halves, ridge=0.01)["exit_1"]["map"]["kernel"]
    stacked = fit_exits(config, stack_layers(params), [whole], ridge=0.01)["exit_1"]["map"]["kernel"]
    np.testing.assert_allclose(two, one, atol=1e-5)
    np.testing.assert_allclose(stacked, one, atol=1e-4)


def test_what_the_layers_gave_is_fitted_as_their_text_is():
    config, params = attached("linear", hidden=8)
    batches = [batch_of(config, seed) for seed in range(3)]
    taps = [jax.device_get(read_taps(config, params, batch)) for batch in batches]
    found, expected = fit_exits(config, params, taps), fit_exits(config, params, batches)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, found["exit_1"], expected["exit_1"])


def test_errors():
    with pytest.raises(ValueError, match=r"exit\.init='fit'|exit\.init=.*nothing to fit"):
        ExitConfig(2, "embedding", init="fit")
    with pytest.raises(ValueError, match=r"exit\.hidden=8: not read with exit\.kind='norm'"):
        ExitConfig(2, "norm", hidden=8)
    config, params = attached("linear")
    with pytest.raises(ValueError, match=r"layers=\(2,\): the model has exits after layers \(1,\)"):
        el.depth.fit_exits(config, params, [batch_of(config, 0)], layers=(2,))
    with pytest.raises(ValueError, match=r"layers=\(1, 1\): name each exit once"):
        el.depth.fit_exits(config, params, [], layers=(1, 1))
    with pytest.raises(ValueError, match=r"ridge=-1: must be at least 0 and finite"):
        el.depth.fit_exits(config, params, [], ridge=-1)
    with pytest.raises(ValueError, match="no token counts"):
        el.depth.fit_exits(config, params, [batch_of(config, 0, padded=LENGTH)])


def test_a_run_says_what_to_do_about_exits_that_start_above_chance():
    exits = (ExitConfig(1, "norm"), ExitConfig(2, "norm"), ExitConfig(3, "linear", tied=True, init="fit"))
    config = tiny_config(vocab_size=300).with_exits(exits)
    chance = math.log(300)
    metrics = {"loss": 9.0, "loss/exit_1": chance + 0.1, "loss/exit_2": chance - 0.1, "loss/exit_3": 9.0}
    for method in (el.depth.EETuning(config), el.depth.SelfSupervisedExits(config)):
        found = method.remark(metrics)
        assert f"loss/exit_1 is {chance + 0.1:.2f}" in found
        assert f"ln V = {chance:.2f}" in found
        assert 'ExitConfig(1, kind="linear", tied=True, init="fit")' in found
        assert "exit_2" not in found
        assert "exit_3" not in found  # fitted already
        assert not method.remark({**metrics, "loss/exit_1": chance - 0.1})
    assert not el.depth.JointTraining(config).remark(metrics)  # where the model learns too, chance is a start


@pytest.mark.parametrize("hidden", [0, 8])
def test_fitted_exits_train_on_labels_and_on_the_model(hidden):
    """Every parameter gets a gradient, and what is cached gives the loss that is computed afresh."""
    config, params = attached("linear", hidden=hidden)
    batch = batch_of(config, 0)
    params = fit_exits(config, params, [batch])
    for method in (el.depth.EETuning(config), el.depth.SelfSupervisedExits(config)):
        exits, frozen = method.split(params)
        gradient = jax.grad(lambda e, m=method, f=frozen: m.loss(e, f, batch, jnp.int32(0))[0])(exits)
        own = {**gradient["exit_1"]}
        # The MLP beside the map adds nothing at first: its second half learns before its first.
        up = own.pop("mlp")["down"] if hidden else {}
        assert all(np.any(leaf) for leaf in jax.tree.leaves([own, up]))

    taps = method.taps(frozen, batch)
    cached, _ = method.loss(exits, frozen, taps, jnp.int32(0))
    online, _ = method.loss(exits, frozen, batch, jnp.int32(0))
    np.testing.assert_allclose(cached, online, rtol=1e-6)

"""Nested sub-models: weights, curricula, layer dropout, and what one pass computes for all of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.sorted_finetuning import (
    DepthWeights,
    SortedFineTuning,
    depth_weights,
    drop_probabilities,
)
from elastic_lm.models.decoder import Decoder, Params, stack_layers, unstack_layers
from elastic_lm.models.exits import extract
from elastic_lm.models.registry import abstract_params, init_params
from elastic_lm.testing import assert_same_tree, random_tokens, tiny_config

# Programs of moments: compiling them well takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@functools.cache
def model(tied: bool = False) -> tuple[ModelConfig, Params]:
    """Four layers with different windows and parameters far from the identity."""
    config = tiny_config(windows=(0, 3, 0, 5), tied=tied)
    return config, jax.tree.map(lambda p: 4 * p, init_params(config, jax.random.key(0)))


@functools.cache
def packed(config: ModelConfig, rows: int = 3, length: int = 10) -> Batch:
    """Two documents per row; the second one's last targets do not count."""
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, config.vocab_size, (2, rows, length), np.int32)
    positions = np.tile(np.r_[0:4, 0 : length - 4].astype(np.int32), (rows, 1))
    segments = np.tile(np.repeat(np.asarray([1, 2], np.int32), (4, length - 4)), (rows, 1))
    weights = np.tile((np.arange(length) < length - 2).astype(np.float32), (rows, 1))
    return Batch(*map(jnp.asarray, (tokens, targets, weights, positions, segments)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def truncated_loss(config: ModelConfig, params: Params, depth: int, batch: Batch) -> jax.Array:
    """Cross-entropy of the first `depth` layers, run as a model of their own."""
    small, kept = extract(config, params, depth)
    logits = Decoder(small).bind({"params": kept})(batch.tokens, batch.positions, batch.segments).logits
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(entropy * batch.weights) / jnp.sum(batch.weights)


def run(method: SortedFineTuning, params: Params, step: int = 0) -> Any:
    """((loss, metrics), gradient)."""
    call = jit(jax.value_and_grad(method.loss, has_aux=True))
    return call(*method.split(params), packed(method.config), jnp.int32(step))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("linear", [0.1, 0.2, 0.3, 0.4]),
        ("sum", [0.05, 0.15, 0.3, 0.5]),
        ("sqrt", [0.1627, 0.2301, 0.2818, 0.3254]),
        ("inverse", [0.48, 0.24, 0.16, 0.12]),
        ("inverse_sqrt", [0.3591, 0.2539, 0.2073, 0.1796]),
        ("layerskip", [0.0, 0.1, 0.3, 0.6]),
    ],
)
def test_depth_weights_in_closed_form(kind: DepthWeights, expected: list[float]) -> None:
    np.testing.assert_allclose(depth_weights((1, 2, 3, 4), 4, kind), expected, atol=5e-5)
    for depths in ((4,), (2, 4), (1, 3, 4)):
        for scale in (1.0, 0.2):
            assert sum(depth_weights(depths, 4, kind, scale)) == pytest.approx(1.0)


def test_depth_scale() -> None:
    np.testing.assert_allclose(depth_weights((1, 2, 3, 4), 4, "uniform", 0.5), [0.2, 0.2, 0.2, 0.4])
    # e = (0, 1, 3) * 0.2 and 3 + (0 + 1 + 2) * 0.2 for four layers counted from 0
    expected = np.array([0.0, 0.2, 0.6, 3.6]) / 4.4
    np.testing.assert_allclose(depth_weights((1, 2, 3, 4), 4, "layerskip", 0.2), expected)


def active(method: SortedFineTuning, steps: int) -> list[str]:
    """Which sub-models have weight, step by step."""
    return ["".join("FT"[int(w > 0)] for w in method.weights(step)) for step in range(steps)]


def test_rotational_curriculum() -> None:
    rotational = SortedFineTuning(tiny_config(), curriculum="rotational", curriculum_period=3)
    assert active(rotational, 4) == ["TFFT", "FTFT", "FFTT", "TFFT"]
    np.testing.assert_allclose(rotational.weights(1), [0, 0.5, 0, 0.5])
    skip = SortedFineTuning(
        tiny_config(), depth_weights="layerskip", curriculum="rotational", curriculum_period=2
    )
    np.testing.assert_allclose(skip.weights(1), [0, 1 / 7, 0, 6 / 7], rtol=1e-6)


def test_gradual_curriculum() -> None:
    gradual = SortedFineTuning(tiny_config(), curriculum="gradual", curriculum_period=1)
    assert active(gradual, 5) == ["FFFT", "FFTT", "FTTT", "TTTT", "TTTT"]
    half = SortedFineTuning(tiny_config(), curriculum="gradual", steps=16)  # one more every 16 / (2 * 4)
    assert active(half, 8) == ["FFFT", "FFFT", "FFTT", "FFTT", "FTTT", "FTTT", "TTTT", "TTTT"]
    np.testing.assert_allclose(half.weights(2), [0, 0, 0.5, 0.5])


def test_sampled_sub_models_follow_their_weights() -> None:
    sampled = SortedFineTuning(tiny_config(), depth_weights="linear", curriculum="sampled")
    draws = jax.vmap(sampled.weights)(jnp.arange(2000))
    assert set(np.unique(draws)) == {0.0, 1.0}
    np.testing.assert_allclose(draws.sum(1), 1)
    np.testing.assert_allclose(draws.mean(0), [0.1, 0.2, 0.3, 0.4], atol=0.04)
    other = SortedFineTuning(tiny_config(), depth_weights="linear", curriculum="sampled", seed=1)
    assert np.any(jax.vmap(other.weights)(jnp.arange(20)) != draws[:20])


@pytest.mark.parametrize(("tied", "stacked"), [(False, True), (True, False)])
def test_loss_is_the_weighted_mean_of_truncated_models(tied: bool, stacked: bool) -> None:
    config, params = model(tied)
    method = SortedFineTuning(config, depths=(1, 3), depth_weights="linear", loss_chunk=4)
    assert method.depths == (1, 3, 4)
    (loss, metrics), _ = run(method, stack_layers(params) if stacked else params)
    each = {n: truncated_loss(config, params, n, packed(config)) for n in method.depths}
    CLOSE(loss, sum(n * each[n] for n in method.depths) / 8)
    CLOSE(metrics["loss/depth_1"], each[1])
    CLOSE(metrics["loss/depth_3"], each[3])
    CLOSE(metrics["loss/final"], each[4])
    assert len({round(float(value), 3) for value in each.values()}) == 3


@pytest.mark.parametrize("stacked", [False, True])
def test_gradient_is_the_sum_of_separate_gradients(stacked: bool) -> None:
    config, params = model()
    method = SortedFineTuning(config, depths=(1, 2))
    _, grads = run(method, stack_layers(params) if stacked else params)

    def mean(params: Params) -> jax.Array:
        return sum(truncated_loss(config, params, n, packed(config)) for n in (1, 2, 4)) / 3

    found = unstack_layers(grads) if stacked else grads
    jax.tree.map(CLOSE, found, jit(jax.grad(mean))(params))


@pytest.mark.long
def test_remat_changes_nothing() -> None:
    config, params = model()
    jax.tree.map(
        CLOSE, run(SortedFineTuning(config, remat=True), params), run(SortedFineTuning(config), params)
    )


@pytest.mark.parametrize(
    ("curriculum", "tied"), [pytest.param("sampled", True, marks=pytest.mark.long), ("rotational", False)]
)
def test_sparse_steps_equal_the_loss_of_their_sub_models(curriculum: Any, tied: bool) -> None:
    config, params = model(tied)
    period = 3 if curriculum in ("rotational", "gradual") else 0
    method = SortedFineTuning(config, curriculum=curriculum, curriculum_period=period)
    call = jit(jax.value_and_grad(method.loss, has_aux=True))

    @jit
    @jax.value_and_grad
    def expected(params: Params, weights: jax.Array) -> jax.Array:
        return sum(w * truncated_loss(config, params, n, packed(config)) for n, w in enumerate(weights, 1))

    for step in range(3):
        (loss, metrics), grads = call(params, {}, packed(config), jnp.int32(step))
        jax.tree.map(CLOSE, (loss, grads), expected(params, method.weights(step)))
        assert ("loss/final" in metrics) == (curriculum != "sampled")
    assert call._cache_size() == 1


@pytest.mark.parametrize("stacked", [False, True])
def test_extraction_is_truncation(stacked: bool) -> None:
    config, params = model()
    tokens = random_tokens(config, 2, 9)
    small, kept = extract(config, stack_layers(params) if stacked else params, 2)
    assert (small.n_layers, small.windows, small.exits) == (2, (0, 3), ())
    kept = unstack_layers(kept) if stacked else kept
    assert kept.keys() == abstract_params(small).keys()

    @jit
    def cut(params: Params) -> jax.Array:
        decoder = Decoder(config).bind({"params": params})
        return decoder.final_logits(decoder.final_features(decoder.taps(tokens, (2,))[2].hidden))

    CLOSE(jit(Decoder(small).apply)({"params": kept}, tokens).logits, cut(params))
    assert_same_tree(extract(config, params, 4)[1], params)
    for n in (0, 5):
        with pytest.raises(ValueError, match=rf"n={n}: the model has 4 layers"):
            extract(config, params, n)


def test_dropout_probabilities() -> None:
    np.testing.assert_allclose(drop_probabilities(3, 0.2, 0, 0), [0, 0.2 * (2**0.5 - 1), 0.2], rtol=1e-5)
    five = np.asarray(drop_probabilities(5, 0.5, 0, 7))
    assert five[0] == 0
    assert five[-1] == pytest.approx(0.5)
    assert np.all(np.diff(five) > 0)
    for step, scale in [(0, 0.0), (5, 2**0.5 - 1), (10, 1.0), (20, 1.0)]:  # S over 11 steps
        np.testing.assert_allclose(drop_probabilities(5, 0.5, 11, step), scale * five, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(drop_probabilities(1, 0.5, 0, 0), [0.0])


def test_kept_layers_follow_seed_and_step() -> None:
    method = SortedFineTuning(tiny_config(), layer_dropout=0.5, seed=3)
    kept = method.kept_layers(2, 4000)
    assert kept is not None
    drop = 1 - np.asarray(kept).mean(1)
    np.testing.assert_allclose(drop, drop_probabilities(4, 0.5, 0, 2), atol=0.03)
    assert drop[0] == 0
    assert jnp.array_equal(kept, method.kept_layers(2, 4000))
    assert not jnp.array_equal(kept, method.kept_layers(3, 4000))
    assert SortedFineTuning(tiny_config()).kept_layers(2, 5) is None
    always = SortedFineTuning(tiny_config(), layer_dropout=1.0).kept_layers(0, 500)
    assert always is not None
    assert not np.any(always[-1])


@pytest.mark.parametrize(("stacked", "remat"), [(False, False), (False, True), (True, False), (True, True)])
def test_skipped_layers_are_the_identity(stacked: bool, remat: bool) -> None:
    config, params = model()
    tokens, depths = random_tokens(config, 2, 7), (1, 2, 4)
    form = stack_layers(params) if stacked else params

    @jit
    def hidden(keep_LB: jax.Array | None) -> dict[int, jax.Array]:
        taps = Decoder(config, remat).bind({"params": form}).taps(tokens, depths, keep_LB=keep_LB)
        return {depth: tap.hidden for depth, tap in taps.items()}

    plain = hidden(None)
    assert_same_tree(hidden(jnp.ones((4, 2), bool)), plain)
    found = hidden(jnp.ones((4, 2), bool).at[:, 0].set(False).at[1, 1].set(False))
    embedded = Decoder(config).bind({"params": params}).embed(tokens, jnp.arange(7)[None])
    for depth in depths:
        assert jnp.array_equal(found[depth][0], embedded[0]), "row 0 skips every layer"
    assert jnp.array_equal(found[2][1], plain[1][1]), "row 1 skips the second layer"
    assert not jnp.array_equal(found[4][1], plain[4][1])


@pytest.mark.parametrize("stacked", [False, True])
def test_layer_dropout_in_the_loss(stacked: bool) -> None:
    config, params = model()
    form = stack_layers(params) if stacked else params
    (plain, _), _ = run(SortedFineTuning(config), form)
    ramp = SortedFineTuning(config, layer_dropout=0.9, dropout_ramp=100)
    call = jit(jax.value_and_grad(ramp.loss, has_aux=True))
    losses = [call(form, {}, packed(config), jnp.int32(step))[0][0] for step in (0, 99, 99, 100)]
    CLOSE(losses[0], plain)  # p = 0 in step 0
    assert losses[1] == losses[2]
    assert len({float(plain), float(losses[1]), float(losses[3])}) == 3


def temporary_bytes(depths: tuple[int, ...]) -> int:
    config = tiny_config(
        n_layers=4, vocab_size=8192, d_model=16, n_heads=2, n_kv_heads=1, d_mlp=16, max_len=512
    )
    method = SortedFineTuning(config, depths=depths, loss_chunk=16)
    params = init_params(config, jax.random.key(0))
    args = (params, {}, packed(config, 2, 512), jnp.int32(0))
    step = jit(jax.value_and_grad(method.loss, has_aux=True)).lower(*args)
    return step.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.long
def test_memory_does_not_grow_with_sub_models_times_vocabulary() -> None:
    logits = 2 * 512 * 8192 * 4  # of one sub-model: 33.5 MB
    one, four = temporary_bytes((4,)), temporary_bytes(())
    assert four - one < logits / 10, f"three more sub-models take {four - one} bytes"


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"method\.depths=\(0, 4\): must be distinct layers, counted from 1"):
        SortedFineTuning(tiny_config(), depths=(0, 4))
    with pytest.raises(ValueError, match=r"method\.depths=\(5,\): .*layers 1 \.\. 4"):
        SortedFineTuning(tiny_config(), depths=(5,))
    with pytest.raises(ValueError, match=r"method\.curriculum_period=0"):
        SortedFineTuning(tiny_config(), curriculum="rotational")

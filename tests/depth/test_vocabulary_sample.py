"""A part of the vocabulary that stands for all of it: whom it holds, and what it estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.cached_taps import Taps
from elastic_lm.depth.self_supervised import SelfSupervisedConfig, SelfSupervisedExits, cache_taps
from elastic_lm.depth.vocabulary_sample import columns, likeliest, nearness
from elastic_lm.models.exits import attach_exits
from elastic_lm.testing import random_params, random_tokens, tiny_config

VOCAB, DRAWN = 64, 16
LOGITS = jnp.asarray(np.random.default_rng(0).normal(0, 2, (3, 5, VOCAB)), jnp.float32)
NEARNESS = jnp.stack([nearness(row) for row in LOGITS])


def test_every_choice_of_the_model_is_there() -> None:
    kept = np.asarray(likeliest(NEARNESS, 5))
    assert kept.shape == (3, 5)
    for row, choices in zip(kept, np.asarray(jnp.argmax(LOGITS, -1)), strict=True):
        assert len(set(row)) == 5
        assert set(choices) <= set(row)


def test_columns_stand_for_the_whole_vocabulary() -> None:
    kept = likeliest(NEARNESS, 6)
    found = jax.device_get(columns(kept, VOCAB, DRAWN, jax.random.key(0)))
    there = found.offsets > -1e29
    assert len(set(found.ids[there])) == there.sum()
    assert set(np.asarray(kept).ravel()) <= set(found.ids[there])
    np.testing.assert_allclose(np.exp(found.offsets[there]).sum(), VOCAB, rtol=1e-5)


def test_sums_over_the_vocabulary_are_estimated_without_bias() -> None:
    scores = jnp.exp(LOGITS[0, 0])
    kept = likeliest(NEARNESS[1:2], 4)

    def estimate(key: jax.Array) -> jax.Array:
        found = columns(kept, VOCAB, DRAWN, key)
        return jnp.sum(scores[found.ids] * jnp.exp(found.offsets))

    found = np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), 4000)))
    assert abs(found.mean() - float(scores.sum())) < 4 * found.std() / len(found) ** 0.5


@pytest.mark.parametrize("tied", [True, False])
def test_exits_train_on_a_part_of_the_vocabulary(tied: bool) -> None:
    """The estimated loss and its gradient are those of the whole vocabulary, on average."""
    base = tiny_config(vocab_size=VOCAB)
    exits = [ExitConfig(2, "linear", tied=tied)]
    config, params = attach_exits(base, random_params(base, scale=0.4), exits, jax.random.key(0))
    tokens, ones = random_tokens(config, batch=2, length=9), jnp.ones((2, 9), jnp.int32)
    batch = Batch(tokens, tokens, 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)
    method = SelfSupervisedExits(config, candidates=48, loss_chunk=4)
    trainable, frozen = method.split(params)
    (taps,) = cache_taps(method, frozen, [batch])
    assert taps.likeliest is not None
    assert taps.likeliest.shape == (2, 18)

    def slopes(method: SelfSupervisedExits, data: Taps, step: jax.Array) -> jax.Array:
        loss, slope = jax.value_and_grad(lambda p: method.loss(p, frozen, data, step)[0])(trainable)
        return jnp.append(loss, slope["exit_2"]["map"]["kernel"].ravel())

    found = jax.jit(jax.vmap(lambda step: slopes(method, taps, step)))(jnp.arange(64))
    whole = jax.jit(slopes, static_argnums=0)(SelfSupervisedExits(config), taps.replace(likeliest=None), 0)
    # The mean of 64 draws is as far off as their spread says, which is less than a tenth.
    off, spread = np.linalg.norm(found.mean(0) - whole), np.linalg.norm(found.std(0)) / 64**0.5
    assert off < min(3 * spread, 0.1 * np.linalg.norm(whole))

    online = jax.jit(method.loss)(trainable, frozen, batch, jnp.int32(3))[0]
    np.testing.assert_allclose(online, found[3, 0], rtol=1e-4)


def test_messages() -> None:
    gated = tiny_config(vocab_size=VOCAB).with_exits((ExitConfig(2, "norm", gate=4),))
    with pytest.raises(ValueError, match=r"method.candidates=16: the exits after layers \(2,\) have gates"):
        SelfSupervisedExits(gated, candidates=16)
    with pytest.raises(ValueError, match=r"method.top_k=8: not read with method.candidates=64"):
        SelfSupervisedConfig(top_k=8, candidates=64)
    with pytest.raises(ValueError, match=r"method.candidates=64: not read with method.objective='argmax'"):
        SelfSupervisedConfig(objective="argmax", candidates=64)

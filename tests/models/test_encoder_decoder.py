"""Encoder-decoder models: who sees whom, cached steps, and meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.decode import cache
from elastic_lm.models.encoder_decoder import EncoderDecoder
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import make_mesh, param_shardings

CONFIG = EncoderDecoderConfig(
    48, 32, 2, 4, 40, head_dim=8, tied=False, scaled_head=False, relative_buckets=8, relative_max_distance=10
)
SOURCE, TARGET = np.random.default_rng(0).integers(2, 48, (2, 2, 9))
MASK = np.asarray([[True] * 9, [True] * 6 + [False] * 3])


@functools.cache
def params():
    return jax.tree.map(lambda x: 2 * x, init_params(CONFIG, jax.random.key(0)))


@jax.jit
def logits(params, source, target, mask):
    return EncoderDecoder(CONFIG).apply({"params": params}, source, target, mask)


def test_a_target_sees_what_came_before_it_and_all_of_its_source() -> None:
    before = logits(params(), SOURCE, TARGET, MASK)
    for place in (1, 5, 8):
        target, source = TARGET.copy(), SOURCE.copy()
        target[:, place], source[:, place] = 47 - target[:, place], 47 - source[:, place]
        after = logits(params(), SOURCE, target, MASK)
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert (np.abs(after[:, place:] - before[:, place:]).max(-1) > 1e-4).all()
        moved = np.abs(logits(params(), source, TARGET, MASK) - before).max(-1) > 0
        assert moved[0].all()
        assert moved[1].any() == MASK[1, place]


def test_padding_changes_nothing() -> None:
    padded = [np.pad(x, [(0, 0), (0, 4)]) for x in (SOURCE, MASK)]
    wider = logits(params(), padded[0], TARGET, padded[1])
    np.testing.assert_allclose(wider, logits(params(), SOURCE, TARGET, MASK), rtol=1e-4, atol=5e-4)


def test_steps_with_caches_give_the_logits_of_one_pass() -> None:
    @jax.jit
    def stepwise(params):
        model = EncoderDecoder(CONFIG).bind({"params": params})
        source = model.source(model.encode(SOURCE, MASK), jnp.asarray(MASK))
        room = jnp.zeros((2, 4, 12, 8))
        caches, found = [(room, room)] * 2, []
        for t in range(4):
            past = [cache.past(layer, jnp.full((2,), t)) for layer in caches]
            new, new_kv = model.step(jnp.asarray(TARGET[:, t]), jnp.int32(t), past, source)
            caches = [cache.write(c, kv, jnp.int32(t)) for c, kv in zip(caches, new_kv, strict=True)]
            found.append(new)
        return jnp.stack(found, axis=1)

    whole = logits(params(), SOURCE, TARGET, MASK)[:, :4]
    np.testing.assert_allclose(stepwise(params()), whole, rtol=1e-4, atol=5e-4)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_mesh_of_eight_gives_the_same_logits() -> None:
    placed = jax.device_put(params(), param_shardings(CONFIG, make_mesh(1, 2, 4)))
    layer = placed["decoder"]["layers_0"]
    assert layer["cross"]["kv"]["kernel"].addressable_shards[0].data.shape == (1, 2, 8, 16)
    assert layer["relative_bias"]["table"].addressable_shards[0].data.shape == (8, 1)
    wanted = logits(params(), SOURCE, TARGET, MASK)
    np.testing.assert_allclose(logits(placed, SOURCE, TARGET, MASK), wanted, rtol=1e-4, atol=1e-4)

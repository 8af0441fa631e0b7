"""Every encoder: padding has no influence, passes go on from any depth, heads, meshes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.models.encoder import Encoder, EncoderOutput, mean_state, position_ids
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import batch_sharding, make_mesh, param_shardings
from elastic_lm.models.task_heads import attach_task_exits, attach_task_head, exit_encoder, lowest_layers

CONFIG = EncoderConfig(
    vocab_size=48, d_model=32, n_layers=3, n_heads=4, d_mlp=64, max_len=16, n_labels=3, mlm=True
)
ROBERTA = dataclasses.replace(CONFIG, position_offset=2, type_vocab_size=1, pad_id=1, family="roberta")


@functools.cache
def model(config: EncoderConfig = CONFIG):
    params = init_params(config, jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(noise), p.shape), params)
    return Encoder(config).bind({"params": params})


def tokens_and_mask(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    tokens = np.random.default_rng(seed).integers(2, 48, (2, 8))
    mask = np.arange(8) < np.asarray([[8], [5]])
    return jnp.asarray(np.where(mask, tokens, 1)), jnp.asarray(mask)


@pytest.mark.parametrize("config", [CONFIG, ROBERTA], ids=["bert", "roberta"])
def test_what_is_masked_never_influences_others(config: EncoderConfig) -> None:
    tokens, mask = tokens_and_mask()
    holes = mask.at[0, 3].set(False)
    wanted = model(config)(tokens, holes)
    found = model(config)(jnp.where(holes, tokens, 7), holes, jnp.where(holes, 0, config.type_vocab_size - 1))
    there = np.asarray(holes)
    np.testing.assert_array_equal(np.asarray(found.hidden)[there], np.asarray(wanted.hidden)[there])
    np.testing.assert_array_equal(found.logits, wanted.logits)
    everything = model(config)(jnp.where(holes, tokens, 7))
    assert not np.allclose(np.asarray(everything.hidden)[there], np.asarray(wanted.hidden)[there], atol=1e-3)


def test_every_token_sees_those_after_it() -> None:
    tokens, _ = tokens_and_mask()
    before, after = (model()(t).hidden[:, 0] for t in (tokens, tokens.at[:, -1].set(3)))
    assert not np.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_state_is_continued_to_the_same_bits(depth: int) -> None:
    tokens, mask = tokens_and_mask()
    whole = model()(tokens, mask)
    early = model()(tokens, mask, depth=depth)
    np.testing.assert_array_equal(early.hidden, model().states(tokens, mask, depth=depth))
    rest = model().run_layers(early.hidden, mask, depth, 3)
    np.testing.assert_array_equal(rest, whole.hidden)
    np.testing.assert_array_equal(model().task_logits(model().pool(rest)), whole.logits)


def test_positions_count_from_the_offset_over_tokens_that_are_there() -> None:
    tokens = jnp.asarray([[5, 6, 7, 1, 1], [1, 1, 5, 6, 7]])
    assert position_ids(ROBERTA, tokens).tolist() == [[2, 3, 4, 1, 1], [1, 1, 2, 3, 4]]
    assert position_ids(CONFIG, tokens).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_logits_are_float32_and_only_what_is_asked_for_is_given() -> None:
    tokens, mask = tokens_and_mask()
    half = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    params = init_params(half, jax.random.key(0))
    run = functools.partial(Encoder(half).apply, {"params": params}, tokens, mask)
    out, asked = run(), run(token_logits=True)
    assert isinstance(out, EncoderOutput)
    assert isinstance(asked, EncoderOutput)
    assert (out.hidden.dtype, out.logits.dtype, out.token_logits) == (jnp.bfloat16, jnp.float32, None)
    assert (asked.token_logits.shape, asked.token_logits.dtype) == ((2, 8, 48), jnp.float32)


def test_a_fresh_head_takes_the_place_of_the_old_one() -> None:
    params = model().variables["params"]
    config, new = attach_task_head(CONFIG, params, 5, "classification", jax.random.key(2), "abcde")
    assert (config.n_labels, config.labels) == (5, ("a", "b", "c", "d", "e"))
    assert new["head"]["kernel"].shape == (5, 32)
    assert new["pooler"] is params["pooler"]
    assert params["head"]["kernel"].shape == (3, 32)
    bare = dataclasses.replace(CONFIG, n_labels=0, pooler="none", family="distilbert")
    config, new = attach_task_head(
        bare, init_params(bare, jax.random.key(0)), 1, "regression", jax.random.key(2)
    )
    assert (config.pooler, config.problem, set(new["pooler"])) == ("relu", "regression", {"kernel", "bias"})
    tokens, mask = tokens_and_mask()
    assert el.Encoder(config).bind({"params": new})(tokens, mask).logits.shape == (2, 1)


def test_exits_leave_the_model_as_it_was() -> None:
    params, (tokens, mask) = model().variables["params"], tokens_and_mask()
    config, new = attach_task_exits(CONFIG, params, (1, 2))
    assert set(new) == {*params, "exit_1", "exit_2"}
    chex.assert_trees_all_equal_shapes_and_dtypes(new, init_params(config, jax.random.key(1)))
    new["exit_1"]["head"]["kernel"] += 1.0
    whole, exited = model()(tokens, mask), Encoder(config).bind({"params": new})
    counted = np.where(mask[..., None], whole.hidden, 0.0).sum(axis=1) / mask.sum(axis=1)[:, None]
    np.testing.assert_allclose(mean_state(whole.hidden, mask), counted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(exited(tokens, mask).logits, whole.logits)
    first, second, last = exited.all_logits(tokens, mask)
    np.testing.assert_allclose(last, whole.logits, rtol=1e-5, atol=1e-5)
    for layer, logits in ((1, first), (2, second)):
        small, own = exit_encoder(config, new, layer)
        assert (small.n_layers, small.exits, small.mlm) == (layer, (), False)
        np.testing.assert_allclose(
            logits, Encoder(small).apply({"params": own}, tokens, mask).logits, 1e-5, 1e-5
        )
    fewer, kept = attach_task_exits(config, new, (1,))
    assert fewer.exits == (1,)
    assert kept["exit_1"] is new["exit_1"]
    assert "exit_2" not in kept
    lowest, few = lowest_layers(config, new, 2)
    assert lowest.exits == ()
    assert set(few) == set(params) - {"layers_2"}
    headless = dataclasses.replace(CONFIG, n_labels=0)
    with pytest.raises(ValueError, match=r"n_labels=0: the model has no task head, which exits begin with"):
        attach_task_exits(headless, {}, (1,))
    other, fresh = attach_task_head(config, new, 5, "classification", jax.random.key(2))
    assert other.exits == ()
    assert set(fresh) == set(params)


def test_what_does_not_fit_is_refused_by_name() -> None:
    tokens, _ = tokens_and_mask()
    for changes, words in (
        ({"n_heads": 5}, r"d_model=32: must be a multiple of n_heads=5"),
        ({"pooler": "none"}, r"pooler='none'.*tanh or relu"),
        ({"pooler": "mean"}, r"pooler='mean': must be one of"),
        ({"labels": ("a",)}, r"labels=.*n_labels=3"),
        ({"problem": "ranking"}, r"problem='ranking'"),
        ({"vocab_size": 0}, r"vocab_size=0"),
        ({"exits": (2, 1)}, r"exits=\(2, 1\): must be a tuple of distinct layers"),
        ({"exits": [1, 2]}, r"exits=\[1, 2\]: must be a tuple: write \(1, 2\)"),
        ({"exits": ("1",)}, r"exits\[0\]='1': must be a whole number"),
        ({"exits": (3,)}, r"exits=\(3,\): must lie between 1 and 2"),
        ({"exits": (1,), "n_labels": 0}, r"exits=\(1,\): are heads of a task"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(CONFIG, **changes)
    bare = model(dataclasses.replace(CONFIG, n_labels=0, mlm=False, pooler="none"))
    for call, words in (
        (lambda: model()(jnp.ones((1, 17), jnp.int32)), r"tokens.shape\[1\]=17.*max_len=16"),
        (lambda: model()(tokens, depth=4), r"\(0, 4\).*n_layers=3"),
        (lambda: bare(tokens, token_logits=True), r"mlm=False"),
        (lambda: bare.pool(bare.states(tokens)), r"pooler='none'"),
        (lambda: attach_task_head(CONFIG, {}, 0, "classification", jax.random.key(0)), r"n_labels=0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_mesh_of_eight_gives_the_same_states() -> None:
    params, (tokens, mask) = model().variables["params"], tokens_and_mask()
    mesh = make_mesh(2, 2, 2)
    rows = [jax.device_put(jnp.tile(x, (4, 1)), batch_sharding(mesh)) for x in (tokens, mask)]
    # Three labels are not split; the head's other dimension is, like the rest of the model.
    placed = jax.device_put(params, param_shardings(CONFIG, mesh))
    assert placed["layers_0"]["attn"]["qkv"]["kernel"].addressable_shards[0].data.shape == (2, 3, 8, 16)
    assert placed["head"]["kernel"].addressable_shards[0].data.shape == (3, 16)
    found = jax.jit(Encoder(CONFIG).apply)({"params": placed}, *rows)
    wanted = model()(tokens, mask)
    np.testing.assert_allclose(found.hidden[:2], wanted.hidden, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.logits[:2], wanted.logits, rtol=1e-4, atol=1e-4)

"""The search for draft layers: it foresees what a drafter does, and leaves out what does nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.bench import drafter_plan
from elastic_lm.models.registry import init_params
from elastic_lm.width import draft_layers

PROMPT, NEW = 6, 24


def written(config, scale=0.3):
    """A model whose later layers change little, and eight rows of its own greedy text."""
    params = jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, init_params(config, jax.random.key(0)))
    for i in range(1, config.n_layers):
        for part, kernel in (("attn", "out"), ("mlp", "down")):
            layer = params[f"layers_{i}"][part]
            layer[kernel] = jax.tree.map(lambda x: scale * x, layer[kernel])
    prompts = np.random.default_rng(0).integers(0, 64, (8, PROMPT)).tolist()
    samples = el.Sampler(el.Decoder(config), params, window=2).sample(prompts, NEW)
    texts = np.asarray(
        [[*prompt, *sample.tokens] for prompt, sample in zip(prompts, samples, strict=True)], np.int32
    )
    return params, texts


@pytest.fixture(scope="module")
def model():
    config = el.testing.tiny_config()
    return config, *written(config)


def agreements(config, params, texts, drafter):
    """[R, T] bool: where the drafter's choice, given the text before, is the whole model's."""
    items = draft_layers._items(config, el.width.Workload())
    whole = draft_layers._whole_pass(config, params, jnp.asarray(texts))
    state = whole.embedded
    for item in items:
        left_out = drafter.no_attention if item.half == "attention" else drafter.no_mlp
        if item.layer in drafter.subnet.layers and item.layer not in left_out:
            state = draft_layers._run(config, params, item, state, whole.kv[item.layer])
    return np.asarray(draft_layers._choices(config, params, state) == whole.choice)


@pytest.mark.long
@pytest.mark.parametrize("windows", [(), (4, 0, 4, 0)])
def test_what_is_foreseen_is_what_is_drafted(windows):
    """With one draft a round, every round begins where the last one ended, and its draft is foreseen."""
    config = el.testing.tiny_config(windows=windows)
    params, texts = written(config)
    drafter = el.Drafter(el.Subnet.uniform(config, layers=(0, 1, 3)), no_attention=(1,), no_mlp=(3,))
    agrees = agreements(config, params, texts[:, :-1], drafter)
    assert 0.2 < agrees[:, PROMPT - 1 :].mean() < 0.95

    sampler = el.Sampler(el.Decoder(config), params, window=2, lossless=True, drafter=drafter, draft=1)
    for text, right in zip(texts, agrees, strict=True):
        sample = sampler.sample(text[:PROMPT].tolist(), NEW)
        assert sample.tokens == text[PROMPT:].tolist()
        accepted, newest = 0, PROMPT - 1
        while newest < len(text) - 2:  # the last token is left to the whole model
            accepted += right[newest]
            newest += 1 + right[newest]
        assert sample.stats.accepted == accepted


def test_the_table_keeps_the_better_of_two_states(model):
    """Every entry is the best of those that reach it, and the drafters get better as they cost more."""
    config, params, texts = model
    found = el.width.search_drafters(config, params, texts, first=PROMPT - 1, levels=16, most=1.0)
    shares, accepted = ([getattr(one, name) for one in found] for name in ("share", "acceptance"))
    assert shares == sorted(shares)
    assert accepted == sorted(accepted)
    assert accepted[-1] == 1.0  # the whole model
    for one in found[:-1]:
        foreseen = agreements(config, params, texts, one.drafter)[:, PROMPT - 1 :].mean()
        np.testing.assert_allclose(one.acceptance, foreseen, atol=1e-6)
        one.drafter.check(config)


def test_halves_that_do_nothing_are_left_out(model):
    config, params, texts = model
    silent = {1: "mlp", 2: "attn"}
    params = {**params}
    for layer, part in silent.items():
        kernel = "down" if part == "mlp" else "out"
        own = params[f"layers_{layer}"]
        zero = jax.tree.map(jnp.zeros_like, own[part][kernel])
        params[f"layers_{layer}"] = {**own, part: {**own[part], kernel: zero}}
    found = el.width.search_drafters(
        config, params, texts, first=PROMPT - 1, levels=24, most=0.95, candidates=100
    )
    right = next(one for one in found if one.acceptance == 1.0)
    kept = right.drafter
    assert 1 in kept.no_mlp or 1 not in kept.subnet.layers
    assert 2 in kept.no_attention or 2 not in kept.subnet.layers
    assert right.share < 0.9


def test_layers_whose_halves_read_the_same_state_are_chosen_whole():
    config = dataclasses.replace(el.testing.tiny_config(), parallel_residual=True)
    items = draft_layers._items(config, el.width.Workload())
    assert [item.half for item in items] == ["layer"] * 4
    drafter = draft_layers._drafter(config, [items[0], items[3]])
    assert drafter == el.Drafter(el.Subnet.uniform(config, layers=(0, 3)))


def test_forecasts_against_every_number_of_drafts():
    """A pass takes 10, each further position 1, and a step of the drafter, which has half the bytes, 4."""
    costs = [10.0 + k + 4.0 * k for k in range(8)]
    drafter = el.Drafter(el.Subnet.uniform(el.testing.tiny_config(), depth=0.5))
    for share, acceptance in ((0.5, 0.9), (0.25, 0.6), (0.75, 0.2)):
        candidate = el.width.DraftCandidate(drafter, share, 0.9, acceptance)
        found = drafter_plan.forecast(candidate, costs, timed_share=0.5)
        # A step of the timed drafter and its further position take 5 of 10.
        step = 10.0 - (10.0 - 5.0) * (1 - share) / 0.5
        rates = [sum(acceptance**i for i in range(k + 1)) / (k * step + 10.0) for k in range(8)]
        np.testing.assert_allclose(found.step, step)
        assert found.drafts == int(np.argmax(rates))
        np.testing.assert_allclose(found.speedup, 10.0 * max(rates[1:]))


def test_files_of_drafters(tmp_path):
    drafter = el.Drafter(el.Subnet.uniform(el.testing.tiny_config(), layers=(0, 2)), no_mlp=(2,))
    file = tmp_path / "drafter.json"
    el.width.save_drafter(drafter, file, {"forecast": 1.2})
    assert el.width.load_drafter(file) == drafter
    with pytest.raises(FileNotFoundError, match=r"none.json: no such drafter; write one: elastic-lm drafter"):
        el.width.load_drafter(tmp_path / "none.json")
    for text, message in (
        ("{", "not a usable drafter"),
        ('{"format": "other"}', "format='other': must be 'elastic_lm drafter 1'"),
        ('{"format": "elastic_lm drafter 1", "drafter": {"subnet": 1}}', "drafter.subnet"),
        ('{"format": "elastic_lm drafter 1", "drafter": {}}', "needs drafter.subnet"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            el.width.load_drafter(file)

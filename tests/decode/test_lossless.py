"""Lossless rows emit what full depth emits, whatever exits, drafts, batches and firing rules do."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from elastic_lm.config.model import ExitConfig
from elastic_lm.decode import loop
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config

NEW = 16
WINDOW = 4


def agreeable(make_model, exits, **sizes):
    """A model whose layers after the first change little, so that most drafts are right and some wrong."""
    config = dataclasses.replace(tiny_config(n_layers=3, **sizes), exits=exits)
    params = jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, init_params(config, jax.random.key(0)))
    for name in ("layers_1", "layers_2"):
        for part, kernel in (("attn", "out"), ("mlp", "down")):
            params[name][part][kernel] = jax.tree.map(lambda x: 0.3 * x, params[name][part][kernel])
    return make_model(config, params)


@pytest.fixture(scope="module")
def drafting(make_model):
    return agreeable(make_model, (ExitConfig(1, "norm", tied=True), ExitConfig(2, "norm", tied=True)))


@pytest.fixture(scope="module")
def many_prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 64, rng.integers(1, 25)).tolist() for _ in range(200)]


@pytest.fixture(scope="module")
def full(drafting, many_prompts):
    sampler = drafting.sampler()
    batches = [many_prompts[i : i + 8] for i in range(0, 200, 8)]
    return [out.tokens for batch in batches for out in sampler.sample(batch, NEW)]


@pytest.mark.long
@pytest.mark.parametrize("draft", [1, WINDOW - 1])
@pytest.mark.parametrize("thresholds", [(0.0, 2.0), (2.0, 0.0), (0.055, 0.055)])
def test_200_prompts_without_a_differing_token(drafting, many_prompts, full, thresholds, draft):
    """Every exit alone and both together, with the shortest and the longest drafts."""
    sampler = drafting.sampler(thresholds, window=WINDOW, lossless=True, draft=draft)
    outputs = [out for i in range(0, 200, 8) for out in sampler.sample(many_prompts[i : i + 8], NEW)]
    assert [out.tokens for out in outputs] == full
    stats = {id(out.stats): out.stats for out in outputs}.values()
    drafted, accepted = sum(s.drafted for s in stats), sum(s.accepted for s in stats)
    assert 0.3 * drafted < accepted < 0.99 * drafted  # both outcomes of a verification are common
    assert sum(s.wasted for s in stats) == drafted - accepted


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 3])
def test_every_exit_draft_length_and_firing_rule(drafting, many_prompts, full, size):
    exits, drafted = [(0.0, 2.0), (2.0, 0.0), (0.055, 0.055)], 0
    for thresholds, draft, share in itertools.product(exits, [1, 2, 3, None], [0.0, 1.0]):
        sampler = drafting.sampler(thresholds, window=WINDOW, lossless=True, draft=draft, fire_share=share)
        outputs = sampler.sample(many_prompts[:size], NEW)
        assert [out.tokens for out in outputs] == full[:size]
        drafted += outputs[0].stats.drafted
    assert drafted > 100 * size


@pytest.mark.long
def test_drafts_save_deep_ticks(drafting, many_prompts):
    lossless = drafting.sampler((0.0, 2.0), window=WINDOW, lossless=True, draft=3)
    ticks = [lossless.sample(prompt, NEW).stats.segment_ticks for prompt in many_prompts[:8]]
    assert sum(t[-1] for t in ticks) < 0.8 * 8 * NEW
    assert all(t[-1] < t[0] for t in ticks)


@pytest.mark.long
def test_blocks_with_their_own_caches(model, prompts):
    full = [out.tokens for out in model.sampler().sample(prompts, NEW)]
    for thresholds in ((0.0, 0.0), (0.06, 0.06)):
        outputs = model.sampler(thresholds, window=3, lossless=True).sample(prompts, NEW)
        assert [out.tokens for out in outputs] == full


@pytest.mark.long
def test_rows_choose_for_themselves(drafting, many_prompts, full):
    sampler = drafting.sampler((0.0, 2.0), window=WINDOW)
    early = sampler.sample(many_prompts[:8], NEW)
    mixed = sampler.sample(many_prompts[:8], NEW, lossless=[True, False] * 4)
    assert [out.tokens for out in mixed[::2]] == full[:8:2]
    assert [out.tokens for out in mixed[1::2]] == [out.tokens for out in early[1::2]]
    assert all(out.tokens != tokens for out, tokens in zip(early, full, strict=False))


def test_sampled_tokens_are_those_of_full_depth(drafting, many_prompts):
    settings = {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2, "seed": 3}
    full = drafting.sampler().sample(many_prompts[:8], NEW, **settings)
    sampler = drafting.sampler((0.0, 0.0), window=WINDOW, lossless=True)
    outputs = sampler.sample(many_prompts[:8], NEW, **settings)
    assert [out.tokens for out in outputs] == [out.tokens for out in full]
    assert outputs[0].stats.accepted > 0
    assert outputs[0].stats.wasted > 0


@pytest.mark.long
def test_stop_tokens_in_drafts_stop_only_when_verified(drafting, many_prompts, full):
    sampler = drafting.sampler((0.0, 0.0), window=WINDOW, lossless=True)
    for row, tokens in enumerate(full[:8]):
        stops = (tokens[NEW // 2], (tokens[3] + 1) % 64)
        end = next(i for i, token in enumerate(tokens) if token in stops)
        out = sampler.sample(many_prompts[row], NEW, stop_tokens=stops)
        assert out.tokens == tokens[: end + 1]


@pytest.mark.long
def test_stream_shows_only_what_is_verified(drafting, many_prompts, full):
    class Numbers:
        def encode(self, text, *, bos=False):
            return [int(part) for part in text.split()]

        def decode(self, ids):
            return "".join(f"{i} " for i in ids)

    sampler = drafting.sampler((0.0, 0.0), window=WINDOW, lossless=True, tokenizer=Numbers(), stream_every=1)
    pieces = list(sampler.stream(many_prompts[0], NEW))
    assert "".join(pieces) == Numbers().decode(full[0])
    assert len(pieces) > 2


def joint(model, prompt):
    """Probability [V, V] of the next two tokens at temperature 1."""
    size = model.config.vocab_size
    first = np.asarray(jax.nn.softmax(model.forward(jnp.asarray([prompt])).logits[0, -1].astype(float)))
    pairs = jnp.asarray([[*prompt, token] for token in range(size)])
    second = np.asarray(jax.nn.softmax(model.forward(pairs).logits[:, -1].astype(float)))
    return first[:, None] * second


def p_value(counts, expected):
    """Chi-square test; cells with few expected counts are pooled."""
    few = expected < 5
    observed = np.append(counts[~few], counts[few].sum())
    wanted = np.append(expected[~few], expected[few].sum())
    keep = wanted > 0
    return stats.chisquare(observed[keep], wanted[keep] * observed.sum() / wanted[keep].sum()).pvalue


@pytest.fixture(scope="module")
def small(make_model):
    return agreeable(make_model, (ExitConfig(1, "norm", tied=True),), vocab_size=12)


def draw_pairs(model, prompt, rows=2000, calls=5):
    """Counts [V, V] of the two tokens that lossless sampling emits first."""
    sampler = model.sampler((0.0,), window=3, lossless=True, draft=2)
    counts = np.zeros((model.config.vocab_size,) * 2)
    for call in range(calls):
        outputs = sampler.sample([prompt] * rows, 2, temperature=1.0, seed=rows * call)
        pairs = np.asarray([out.tokens for out in outputs])
        np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    return counts, outputs[0].stats


@pytest.mark.long
def test_sampled_pairs_follow_the_full_model(small):
    prompt = [3, 1, 4]
    counts, statistics = draw_pairs(small, prompt)
    assert statistics.wasted > 0
    assert p_value(counts, joint(small, prompt) * counts.sum()) > 0.01


@pytest.mark.long
def test_a_broken_acceptance_rule_is_noticed(small, monkeypatch):
    """Keeping every draft gives another distribution, and the test above sees that."""

    def accept_all(state, controls, drawn, begin, target, ran):
        return state, jnp.zeros(state.length.shape, bool)

    monkeypatch.setattr(loop, "verify", accept_all)

    def run(config, params, state, controls, iterations, mode):
        return loop.run(config, params, state, controls, iterations, mode)

    broken = jax.jit(run, static_argnames=("config", "mode"))  # a new function: nothing compiled before
    monkeypatch.setattr("elastic_lm.decode.served.jit_run", broken)
    prompt = [3, 1, 4]
    counts, _ = draw_pairs(small, prompt)
    assert p_value(counts, joint(small, prompt) * counts.sum()) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1, "lossless": True}, "window=1: lossless decoding needs at least 2"),
        ({"draft": 9, "window": 8}, "draft=9: must be at least 1 and below window=8"),
        ({"draft": 0}, "draft=0"),
        ({"lossless": True, "missing": "propagate"}, "approximate keys and values verify nothing"),
        ({"missing": "guess"}, "missing='guess': must be exact or propagate"),
    ],
)
def test_impossible_settings_are_named(drafting, settings, message):
    with pytest.raises(ValueError, match=message):
        drafting.sampler((0.0, 0.0), **settings).sample([1, 2, 3], 4)

"""A sub-network drafts for the whole model: no token differs, and the caches are the whole model's own."""

import dataclasses
import itertools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Letters

import elastic_lm as el
from elastic_lm.config.model import ExitConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.decode import drafter_costs, drafting, sampler
from elastic_lm.decode.sampling import BROKEN
from elastic_lm.decode.state import Drafting
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config

NEW = 16
WINDOW = 3
SAMPLED = {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2, "seed": 3}
EVEN = (1.0, 1.2, 1.4)  # costs of rounds by which drafts pay, so that nothing is measured


@pytest.fixture(scope="module")
def model(make_model):
    """Layers after the first change little, so that most drafts are right and some wrong; it has an exit."""
    config = dataclasses.replace(tiny_config(n_layers=3), exits=(ExitConfig(2, "norm", tied=True),))
    params = jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, init_params(config, jax.random.key(0)))
    for name in ("layers_1", "layers_2"):
        for part, kernel in (("attn", "out"), ("mlp", "down")):
            params[name][part][kernel] = jax.tree.map(lambda x: 0.3 * x, params[name][part][kernel])
    return make_model(config, params)


@pytest.fixture(scope="module")
def many_prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 64, rng.integers(1, 25)).tolist() for _ in range(32)]


@pytest.fixture(scope="module")
def subnet(model):
    """Narrower and shallower than the model."""
    return Subnet.uniform(model.config, layers=(0, 2), mlp=0.5, heads=0.5)


@pytest.mark.long
def test_no_token_differs(model, subnet, many_prompts, monkeypatch):
    """Greedy and sampled, by fixed and by adaptive drafts, for rows of which one may have more accepted."""
    given_costs(monkeypatch, EVEN)
    full, drafted, wasted = model.sampler(window=WINDOW), 0, 0
    for draft, settings in itertools.product((None, WINDOW - 1), ({}, SAMPLED)):
        decoder = model.sampler(window=WINDOW, lossless=True, drafter=subnet, draft=draft)
        for i in range(0, 8, 2):
            rows = many_prompts[i : i + 2]
            expected = [out.tokens for out in full.sample(rows, NEW, **settings)]
            outputs = decoder.sample(rows, NEW, **settings)
            assert [out.tokens for out in outputs] == expected
            stats = outputs[0].stats
            drafted, wasted = drafted + stats.drafted, wasted + stats.wasted
            kept = sum(layers == 2 for out in outputs for layers in out.exit_layers)
            assert kept == stats.accepted
            assert stats.drafter_ticks >= stats.drafted / 2
    assert 0 < wasted < drafted


@pytest.mark.long
def test_a_token_that_the_drafter_cannot_draw_is_left_to_the_whole_model(
    model, subnet, many_prompts, monkeypatch
):
    given_costs(monkeypatch, EVEN)
    draw = drafting.sample

    def overflowing(logits, tokens, length, settings):
        """As where the layers that are left out make a logit infinite, at every second position."""
        return jnp.where(length % 2 == 0, BROKEN, draw(logits, tokens, length, settings))

    monkeypatch.setattr(drafting, "sample", overflowing)
    window = WINDOW + 2  # programs that no other test has compiled
    decoder = model.sampler(window=window, lossless=True, drafter=subnet)
    outputs = decoder.sample(many_prompts[:2], NEW)
    assert [out.tokens for out in outputs] == [
        out.tokens for out in model.sampler(window=WINDOW).sample(many_prompts[:2], NEW)
    ]
    assert outputs[0].stats.drafted > 0


def test_stop_strings_streams_and_mixed_rows(model, subnet, many_prompts):
    options = {"window": WINDOW, "drafter": subnet, "draft": WINDOW - 1, "tokenizer": Letters()}
    decoder = model.sampler(lossless=True, stream_every=1, **options)
    full = model.sampler(window=WINDOW, tokenizer=Letters())
    expected = full.sample(many_prompts[:2], NEW)

    stops = tuple(out.text[5:7] for out in expected)
    stopped = full.sample(many_prompts[:2], NEW, stop=stops)
    found = decoder.sample(many_prompts[:2], NEW, stop=stops)
    assert [(out.text, out.tokens) for out in found] == [(out.text, out.tokens) for out in stopped]

    mixed = model.sampler(**options).sample(many_prompts[:2], NEW, lossless=[True, False])
    assert [out.tokens for out in mixed] == [out.tokens for out in expected]
    assert [2 in out.exit_layers for out in mixed] == [True, False]


DRAFTERS = {
    "half layers": lambda config: el.Drafter(Subnet.uniform(config, mlp=0.5), no_attention=(1,), no_mlp=(2,)),
    "fewer groups and channels": lambda config: el.Drafter(
        Subnet.uniform(config, layers=(0, 1), groups=0.5, d_model=0.5)
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", DRAFTERS)
def test_no_token_differs_for_drafters_of_other_kinds(model, many_prompts, name):
    """In one batch of 32; with weights that are cut once, or inside the program."""
    inside = name == "half layers"
    decoder = model.sampler(
        window=WINDOW, lossless=True, drafter=DRAFTERS[name](model.config), draft=2, slice_inside=inside
    )
    for settings in ({}, SAMPLED):
        expected = [out.tokens for out in model.sampler(window=WINDOW).sample(many_prompts, NEW, **settings)]
        outputs = decoder.sample(many_prompts, NEW, **settings)
        assert [out.tokens for out in outputs] == expected
        assert 0 < outputs[0].stats.accepted < outputs[0].stats.drafted


@pytest.mark.long
def test_the_whole_model_accepts_its_own_drafts(model, many_prompts):
    whole = Subnet.full(model.config)
    decoder = model.sampler(window=WINDOW, lossless=True, drafter=whole, draft=WINDOW - 1)
    new = 15
    outputs = decoder.sample(many_prompts[:2], new)
    full = model.sampler(window=WINDOW).sample(many_prompts[:2], new)
    assert [out.tokens for out in outputs] == [out.tokens for out in full]
    stats = outputs[0].stats
    assert stats.accepted == stats.drafted == 2 * new * (WINDOW - 1) // WINDOW
    assert stats.verifications == 2 * new // WINDOW


@pytest.mark.long
def test_caches_are_those_of_the_whole_model(model, subnet, many_prompts):
    """Of every verified position, although drafts were written at the same places; costs are measured."""
    kept = []
    drafting_too = model.sampler(window=WINDOW, lossless=True, drafter=subnet)
    for decoder in (drafting_too, model.sampler(window=WINDOW)):
        prefix = el.PrefixCache()
        tokens = decoder.sample(many_prompts[0], NEW, prefix=prefix).tokens
        again = decoder.sample([*many_prompts[0], *tokens, 7], NEW, prefix=prefix)
        assert prefix.reused == len(many_prompts[0]) + NEW - 1
        kept.append((prefix.tokens, again.tokens, jax.device_get(prefix._kept.layers)))
    (ours, text, caches), (theirs, expected, whole) = kept
    assert (ours, text) == (theirs, expected)
    for layer, other in zip(jax.tree.leaves(caches), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(layer[:, :, : len(ours)], other[:, :, : len(ours)], rtol=1e-4, atol=1e-5)

    programs = drafting_too.compilations()
    for prompt in many_prompts[1:4]:
        drafting_too.sample(prompt, NEW)
    assert drafting_too.compilations() == programs

    class Numbers:
        def encode(self, text, *, bos=False):
            return [int(part) for part in text.split()]

        def decode(self, ids):
            return "".join(f"{i} " for i in ids)

    options = {"window": WINDOW, "lossless": True, "drafter": subnet, "draft": WINDOW - 1}
    streaming = model.sampler(stream_every=1, tokenizer=Numbers(), **options)
    pieces = list(streaming.stream(many_prompts[0], NEW))
    assert "".join(pieces) == Numbers().decode(text_of(model, many_prompts[0]))
    assert 2 < len(pieces) <= NEW


def text_of(model, prompt):
    return model.sampler(window=WINDOW).sample(prompt, NEW).tokens


def test_a_drafter_is_checked():
    subnet = Subnet((0, 2), (8, 8), (1, 1), (1, 1), 8)
    for fields, message in (
        ({"no_attention": (1,)}, r"drafter.no_attention=\(1,\): must be some of .* \(0, 2\)"),
        ({"no_mlp": (2, 0)}, r"drafter.no_mlp=\(2, 0\): must be .* in increasing order"),
        (
            {"no_attention": (0,), "no_mlp": (0, 2)},
            r"drafter.no_mlp=.*: layers \[0\] have no attention either",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            el.Drafter(subnet, **fields)


@pytest.mark.long
def test_stop_tokens_and_logprobs(model, subnet, many_prompts):
    full = model.sampler(window=WINDOW)
    decoder = model.sampler(window=WINDOW, lossless=True, drafter=subnet, draft=WINDOW - 1)
    for i in range(0, 8, 2):
        prompts = many_prompts[i : i + 2]
        tokens = full.sample(prompts, NEW)[0].tokens
        end = tokens.index(tokens[NEW // 2])
        out = decoder.sample(prompts, NEW, stop_tokens=(tokens[NEW // 2],))[0]
        assert out.tokens == tokens[: end + 1]
    expected = full.sample(many_prompts[:2], NEW, logprobs=True, top_logprobs=2)
    found = decoder.sample(many_prompts[:2], NEW, logprobs=True, top_logprobs=2)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        ids = [[[i for i, _ in best] for best in sample.top_logprobs] for sample in (one, other)]
        assert ids[0] == ids[1]


def given_costs(monkeypatch, costs):
    monkeypatch.setattr(sampler, "drafter_costs", lambda *_: costs)


@pytest.mark.long
def test_drafts_that_do_not_pay_rest(model, subnet, many_prompts, monkeypatch):
    """Where a step of the drafter costs as much as the whole model, few are tried; where it is free, many."""
    ticks = {}
    for name, costs in {"dear": (1.0, 4.0, 8.0), "free": (1.0, 1.0, 1.0)}.items():
        given_costs(monkeypatch, costs)
        decoder = model.sampler(window=WINDOW, lossless=True, drafter=subnet)
        out = decoder.sample(many_prompts[0], 64)
        assert out.tokens == model.sampler(window=WINDOW).sample(many_prompts[0], 64).tokens
        ticks[name] = out.stats.drafter_ticks
    assert 1 <= ticks["dear"] <= 3 * drafting.PROBES  # at the beginning, and after each of two rests
    assert ticks["free"] > 30


def test_a_draft_goes_on_while_a_longer_one_gives_more_tokens_per_second():
    """Against every number of drafts, tried one by one."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs = np.cumsum(rng.uniform(0.1, 1.0, 6))
        rate, reach, expected = rng.uniform(0.05, 0.95), rng.uniform(0, 1, 3), rng.uniform(1, 3, 3)
        drafts = int(rng.integers(0, 5))
        active, rows = rng.uniform(size=3) < 0.7, np.array([True, True, False])
        gained = [
            (expected[rows].sum() + (reach * active).sum() * sum(rate**i for i in range(1, m - drafts + 1)))
            / costs[m]
            for m in range(drafts, 6)
        ]
        now = drafting._Round(
            (), *[jnp.zeros(1)] * 3, *map(jnp.asarray, (active, 0.0, reach, expected, drafts))
        )
        prior = jnp.ones(len(drafting.PRIOR))
        known = Drafting(*[jnp.zeros(1)] * 7).replace(hits=rate * prior, trials=prior)
        controls = dataclasses.make_dataclass("Costs", ["tick_costs"])(jnp.asarray(costs))
        assert bool(drafting._pays(now, known, controls, jnp.asarray(rows))) == (
            max(gained) > gained[0] + 1e-6
        )


def test_acceptance_is_counted_by_the_probability_of_each_draft(model):
    class Round:
        def __init__(self, accepted, drafting=None):
            self.accepted, self.drafting = jnp.asarray(accepted), drafting

    blank = Drafting(*[jnp.zeros(1)] * 7)
    nothing = jnp.zeros(len(drafting.PRIOR))
    blank = blank.replace(
        confidence=jnp.asarray([[0.99, 0.4, 0.2], [0.05, 0.99, 0.99]]), hits=nothing, trials=nothing
    )
    state = dataclasses.make_dataclass("State", ["accepted", "drafting"])(jnp.asarray([2, 5]), blank)
    found = drafting.learn(state, Round([0, 5]), jnp.asarray([3, 1])).drafting
    # The first row: two right and the third wrong; the second: its only one wrong.
    np.testing.assert_array_equal(found.trials, [1, 0, 1, 1, 0, 0, 0, 1, 4])
    np.testing.assert_array_equal(found.hits, [0, 0, 0, 1, 0, 0, 0, 1, 2])


def test_costs_of_rounds_between_those_that_are_timed():
    """A step of 0.5 and verifications of 1, 1.2, 1.5, 2, 3 and 5 for up to 1, 2, 3, 4, 8 and 16 positions."""
    verifying = {1: 1.0, 2: 1.2, 3: 1.5, 4: 2.0, 8: 3.0, 16: 5.0}

    def seconds(drafts):
        return 0.5 * drafts + next(v for width, v in verifying.items() if width > drafts)

    timed = {k: seconds(k) for k in drafter_costs.timed_drafts(16)}
    assert len(timed) < 10
    np.testing.assert_allclose(drafter_costs.by_drafts(timed, 16), [seconds(k) for k in range(16)])
    assert drafter_costs.by_drafts({0: 1.0, 1: 3.0}, 2) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"lookup": True}, {}, r"lookup=True: drafts are copied, or drawn by a drafter; leave one"),
        ({"exit": el.StaticExit(2, layers=(2,))}, {}, r"exit=.*: a drafter takes the place of exits; leave"),
        ({"missing": "propagate"}, {}, r"missing='propagate': a drafter drafts for rows that are verified"),
        ({"window": 1}, {}, r"window=1: a drafter needs at least 2"),
        ({"lossless": False}, {}, r"drafter=.*: drafts for lossless rows only; give lossless=True"),
        ({}, {"exit": el.StaticExit(2, layers=(2,))}, r"exit=.*: a drafter takes the place of exits; use"),
        ({}, {"lossless": False}, r"drafter=.*: drafts for lossless rows only; give lossless=True"),
        ({}, {"subnet": "half"}, r"subnet=.*: the drafter drafts for the whole model; use a sampler without"),
        ({"subnet": "half"}, {}, r"drafter=.*: drafts for the whole model; leave budget, subnet and elastic"),
        ({"drafter": 3}, {}, r"drafter=3: must be an el.Drafter or an el.Subnet"),
        ({"drafter": "other"}, {}, r"drafter: subnet.layers=\(9,\): the model has 3 layers"),
    ],
)
def test_what_does_not_go_with_a_drafter(model, options, call, message):
    half = Subnet.uniform(model.config, mlp=0.5)
    named = {"half": half, "other": Subnet((9,), (8,), (1,), (1,), 32)}

    def resolved(fields):
        return {k: named.get(v, v) if isinstance(v, str) else v for k, v in fields.items()}

    def decode():
        options_found = {"lossless": True, "drafter": half} | resolved(options)
        decoder = el.Sampler(el.Decoder(model.config), model.params, **options_found)
        decoder.sample([1, 2], 4, **resolved(call))

    with pytest.raises(ValueError, match=message):
        decode()


@pytest.mark.long
def test_drafts_from_a_preview_of_the_head(model, many_prompts):
    """Drafts are drawn from a preview; what they are verified by is the whole head."""
    from elastic_lm.nn.preview import HeadPreview

    d, v = model.config.d_model, model.config.vocab_size
    rng = np.random.default_rng(0)
    preview = HeadPreview(
        jnp.eye(d), jnp.asarray(0.1 * rng.standard_normal((v, 4)), jnp.float32), jnp.ones(v), jnp.float32(0),
        blocks=8, block=4,
    )  # fmt: skip
    options = {"window": WINDOW, "lossless": True, "drafter": Subnet.uniform(model.config, layers=(0, 2))}
    previewed = model.sampler(preview=preview, draft=2, **options).sample(many_prompts, NEW)
    whole = model.sampler(draft=2, **options).sample(many_prompts, NEW)
    assert [out.tokens for out in previewed] == [out.tokens for out in whole]
    assert previewed[0].stats.accepted < whole[0].stats.accepted


@pytest.mark.long
def test_pretrained_stories():
    shared = os.environ.get("ELASTIC_LM_SHARED", "")
    folder = next(iter(sorted(Path(shared or "none").glob("data/weights/*260*"))), None)
    if folder is None:
        pytest.skip("needs stories260K under $ELASTIC_LM_SHARED/data/weights")
    decoder, params = el.load(str(folder))
    texts = ["Once upon a time", "The dog", "Lily had a red ball and", "One day a big bear"]
    tokenizer = el.Tokenizer.load(str(folder))
    full = el.Sampler(decoder, params, tokenizer, window=4)
    config = decoder.config
    decoder = el.Sampler(
        decoder,
        params,
        tokenizer,
        window=4,
        lossless=True,
        drafter=Subnet.uniform(config, layers=(0, 1, 3, 4), mlp=0.5),
    )
    for settings in ({}, {"temperature": 0.8, "seed": 5}):
        expected = [out.tokens for out in full.sample(texts, 64, **settings)]
        outputs = decoder.sample(texts, 64, **settings)
        assert [out.tokens for out in outputs] == expected
        assert outputs[0].stats.drafted > 0

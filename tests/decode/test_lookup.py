"""Prompt lookup: proposals are what the text says, and nothing but speed depends on them."""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig
from elastic_lm.decode import exit_balance, lookup
from elastic_lm.decode import tick_costs as costs
from elastic_lm.decode.options import DecodeOptions
from elastic_lm.decode.prefill import PromptState
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config

NEW = 24
WINDOW = 8
CHEAP = costs.TickCosts(by_width=(1.0,) * WINDOW)  # further positions cost nothing


def proposed(tokens, count, capacity=32):
    """Proposal and match by their definition, one position after the other."""
    best = (0, 0)
    for p in range(1, len(tokens)):
        match = 0
        while match < min(p, lookup.LONGEST_MATCH) and tokens[p - 1 - match] == tokens[-1 - match]:
            match += 1
        best = max(best, (match, p))
    match, start = best
    text = list(tokens)
    for i in range(count):  # a proposal that reaches the end goes on with itself
        text.append(text[start + i])
    return (text[len(tokens) :] if match else [-1] * count), match


@pytest.mark.parametrize("alphabet", [1, 2, 3, 30])
def test_proposals_continue_the_latest_of_the_longest_matches(alphabet):
    rng = np.random.default_rng(alphabet)
    rows = [rng.integers(0, alphabet, rng.integers(1, 30)).tolist() for _ in range(50)]
    array = np.full((50, 32), 7)  # what lies behind the end must not matter
    for row, tokens in zip(array, rows, strict=True):
        row[: len(tokens)] = tokens
    lengths = jnp.asarray([len(tokens) for tokens in rows])
    proposal, match = jax.jit(lookup.propose, static_argnums=2)(jnp.asarray(array), lengths, 5)
    expected = [proposed(tokens, 5) for tokens in rows]
    found = np.asarray(match)[:, None] > 0
    np.testing.assert_array_equal(np.where(found, proposal, -1), [tokens for tokens, _ in expected])
    np.testing.assert_array_equal(match, [length for _, length in expected])


def test_acceptance_is_counted_by_the_match_before_each_token():
    state = lookup.no_proposals(2, 5)
    state = dataclasses.replace(
        state,
        proposal=jnp.asarray([[4, 5, 6, 7], [4, 5, 6, 7]]),
        proposed_at=jnp.asarray([3, 3]),
        match=jnp.asarray([2, 2]),
        hits=jnp.zeros_like(state.hits),
        trials=jnp.zeros_like(state.trials),
    )
    text = jnp.asarray([[1, 2, 3, 4, 5, 9, 7, 0], [1, 2, 3, 4, 5, 9, 7, 0]])
    seen = lookup.learn(state, text, jnp.asarray([7, 4]), jnp.asarray([True, True]))
    # The first row knows four tokens: two come true, the third does not, and the fourth says nothing.
    np.testing.assert_array_equal(seen.trials[0, :5], [0, 1, 1, 1, 0])
    np.testing.assert_array_equal(seen.hits[0, :5], [0, 1, 1, 0, 0])
    # The second knows one.
    np.testing.assert_array_equal(seen.trials[1, :5], [0, 1, 0, 0, 0])
    untouched = lookup.learn(state, text, jnp.asarray([7, 4]), jnp.asarray([False, False]))
    assert not np.any(untouched.trials)


def repeating(make_model, exits=()):
    """A model whose own greedy text soon repeats itself, in part."""
    config = dataclasses.replace(tiny_config(n_layers=3), exits=exits)
    params = jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, init_params(config, jax.random.key(0)))
    return make_model(config, params)


@pytest.fixture(scope="module")
def plain(make_model):
    return repeating(make_model)


@pytest.fixture(scope="module")
def with_exits(make_model):
    return repeating(make_model, (ExitConfig(1, "norm", tied=True), ExitConfig(2, "norm", tied=True)))


@pytest.fixture(scope="module")
def many_prompts():
    rng = np.random.default_rng(1)
    repeated = [rng.integers(0, 64, 6).tolist() * 3 for _ in range(16)]
    return repeated + [rng.integers(0, 64, rng.integers(1, 25)).tolist() for _ in range(16)]


SAMPLED = {"temperature": 0.7, "top_k": 12, "repetition_penalty": 1.1, "seed": 5}


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", [None, 1, WINDOW - 1])
@pytest.mark.parametrize("size", [1, 4])
def test_no_token_differs_from_full_depth(plain, many_prompts, settings, draft, size):
    full = plain.sampler(window=WINDOW)
    sampler = plain.sampler(window=WINDOW, lossless=True, lookup=True, draft=draft)
    copied = 0
    for i in range(0, 32 if size > 1 else 8, size):
        rows = many_prompts[i : i + size]
        expected = [out.tokens for out in full.sample(rows, NEW, **settings)]
        outputs = sampler.sample(rows, NEW, **settings)
        assert [out.tokens for out in outputs] == expected
        copied += outputs[0].stats.copied
        assert outputs[0].stats.copied == sum(layers == 0 for out in outputs for layers in out.exit_layers)
    assert copied > 0 or draft is None


@pytest.mark.long
@pytest.mark.parametrize("thresholds", [(0.0, 2.0), (0.055, 0.055), (2.0, 2.0)])
@pytest.mark.parametrize("draft", [pytest.param(None, marks=pytest.mark.nightly), 3])
def test_before_exits(with_exits, many_prompts, thresholds, draft):
    full = [out.tokens for out in with_exits.sampler(window=WINDOW).sample(many_prompts, NEW)]
    sampler = with_exits.sampler(thresholds, window=WINDOW, lossless=True, lookup=True, draft=draft)
    outputs = sampler.sample(many_prompts, NEW)
    assert [out.tokens for out in outputs] == full


def test_no_exit_adds_to_copied_tokens(with_exits, many_prompts):
    """Neither the first exit nor the second: after a copied token comes another one, or the full model's."""
    sampler = with_exits.sampler((2.0, 0.0), window=WINDOW, lossless=True, lookup=True, draft=5)
    outputs = sampler.sample(many_prompts, NEW)
    after = [b for out in outputs for a, b in itertools.pairwise(out.exit_layers) if a == lookup.COPIED]
    assert set(after) == {lookup.COPIED, 3}


@pytest.mark.long
def test_rows_that_are_not_lossless_copy_nothing(with_exits, many_prompts):
    early = with_exits.sampler((0.0, 2.0), window=WINDOW).sample(many_prompts[:8], NEW)
    full = with_exits.sampler(window=WINDOW).sample(many_prompts[:8], NEW)
    sampler = with_exits.sampler((0.0, 2.0), window=WINDOW, lookup=True, draft=4)
    mixed = sampler.sample(many_prompts[:8], NEW, lossless=[True, False] * 4)
    assert [out.tokens for out in mixed[::2]] == [out.tokens for out in full[::2]]
    assert [out.tokens for out in mixed[1::2]] == [out.tokens for out in early[1::2]]
    assert all(0 not in out.exit_layers for out in mixed[1::2])


def test_rows_that_are_not_lossless_run_beside_those_that_copy(plain, many_prompts):
    """Also after the lossless rows have ended."""
    prompts = [*many_prompts[:2], *many_prompts[16:18]]
    full = [out.tokens for out in plain.sampler(window=WINDOW).sample(prompts, NEW)]
    sampler = plain.sampler(window=WINDOW, lookup=True, draft=WINDOW - 1)
    for lossless in ([True, False, True, False], [True, False, False, False]):
        outputs = sampler.sample(prompts, NEW, lossless=lossless)
        assert [out.tokens for out in outputs] == full
        copied = [lookup.COPIED in out.exit_layers for out in outputs]
        assert copied[0]
        assert not any(copied[i] for i, verified in enumerate(lossless) if not verified)


def test_copies_save_passes(plain):
    """Where the full model repeats itself, most of its passes are saved."""
    sampler = plain.sampler(window=WINDOW, lossless=True, lookup=True, draft=WINDOW - 1)
    prompt = [3, 1, 4, 1, 5]
    text = plain.sampler(window=WINDOW).sample(prompt, 120).tokens
    assert len(set(text[-40:])) < 20  # a cycle
    stats = sampler.sample(prompt, 120).stats
    assert stats.segment_ticks[0] == stats.verifications < 100
    assert stats.copied == stats.accepted > 20
    assert stats.accepted_per_verification == stats.accepted / stats.verifications


def test_stop_tokens_in_copies(plain, many_prompts):
    full, sampler = (
        plain.sampler(window=WINDOW),
        plain.sampler(window=WINDOW, lossless=True, lookup=True, draft=5),
    )
    for prompt in many_prompts[:8]:
        stop = full.sample(prompt, NEW).tokens[NEW // 2]
        settings = {"stop_tokens": (stop,)}
        assert sampler.sample(prompt, NEW, **settings).tokens == full.sample(prompt, NEW, **settings).tokens


def test_the_number_of_drafts_maximises_tokens_per_time():
    state = lookup.no_proposals(1, 5)
    rate = jnp.full_like(state.hits, 0.5)
    state = dataclasses.replace(state, hits=rate, trials=jnp.ones_like(rate))
    expected = lookup.expected_tokens(state, jnp.asarray([3]), 4)
    np.testing.assert_allclose(expected[0], [1, 1.5, 1.75, 1.875, 1.9375])
    np.testing.assert_array_equal(lookup.expected_tokens(state, jnp.asarray([0]), 4)[0], [1, 1, 1, 1, 1])


def test_costs_of_wide_passes_stop_the_drafts(plain, many_prompts, monkeypatch):
    """No token is copied where a second position costs as much as ten passes."""
    import elastic_lm.decode.sampler as sampler_module

    dear = costs.TickCosts(by_width=(1.0,) + (10.0,) * (WINDOW - 1))
    assert dear.longest_rest == costs.LONGEST_REST
    monkeypatch.setattr(sampler_module, "tick_costs", lambda *_: dear)
    sampler = plain.sampler(window=WINDOW, lossless=True, lookup=True)
    stats = sampler.sample(many_prompts[0], NEW).stats
    assert stats.drafted == 0
    assert stats.verifications == NEW

    monkeypatch.setattr(sampler_module, "tick_costs", lambda *_: CHEAP)
    assert sampler.sample(many_prompts[0], NEW).stats.drafted > 0


def test_searches_cost_a_bounded_share_of_the_time():
    widths = (1.0, 1.4, 1.4, 1.4)
    assert costs.TickCosts(widths, search=0.0).longest_rest == 0
    assert costs.TickCosts(widths, search=costs.SEARCH_SHARE).longest_rest == 0
    for search in (0.03, 0.2, 0.5):
        rest = costs.TickCosts(widths, search=search).longest_rest
        assert search / (1 + rest) <= costs.SEARCH_SHARE < search / rest
    assert costs.TickCosts(widths, search=100.0).longest_rest == costs.LONGEST_REST
    # Four positions in the time of four passes: even four right drafts of four would win nothing.
    assert costs.TickCosts((1.0, 2.0, 3.0, 4.0)).longest_rest == costs.LONGEST_REST
    assert costs.TickCosts((1.0, 2.0, 2.9, 4.0)).longest_rest == 0


def test_rests_after_searches_that_bring_nothing_grow(plain):
    """Until one brings something: then every iteration is preceded by a search again."""
    sampler = plain.sampler(window=WINDOW, lossless=True, lookup=True, draft=3)
    _, state, controls = sampler._prefill(sampler._call([[1, 2, 3, 4]]), NEW)
    controls = dataclasses.replace(controls, longest_rest=jnp.int32(5))
    draft = jax.jit(lookup.draft)
    rests = []
    for _ in range(1 + 2 + 4 + 6 + 6):
        state = draft(state, controls, state.alive)
        rests.append(int(state.lookup.rest))
    assert rests == [0, 1, 0, 3, 2, 1, 0, 5, 4, 3, 2, 1, 0, 5, 4, 3, 2, 1, 0]
    assert np.all(state.length == 4)

    repeated = dataclasses.replace(state, tokens=state.tokens.at[:, :4].set(7))
    drafted = draft(repeated, controls, state.alive)
    np.testing.assert_array_equal(drafted.tokens[:, :7], np.full((1, 7), 7))
    assert drafted.length == 7
    assert drafted.lookup.rest == drafted.lookup.next_rest == 0
    np.testing.assert_array_equal(draft(repeated, controls, ~state.alive).length, [4])


@pytest.mark.parametrize("size", [1, 4])
def test_no_token_differs_where_searches_rest(plain, many_prompts, monkeypatch, size):
    import elastic_lm.decode.sampler as sampler_module

    slow = dataclasses.replace(CHEAP, search=0.07)
    monkeypatch.setattr(sampler_module, "tick_costs", lambda *_: slow)
    full = plain.sampler(window=WINDOW)
    sampler = plain.sampler(window=WINDOW, lossless=True, lookup=True, stream_every=3)
    for rows in (many_prompts[:size], many_prompts[16 : 16 + size]):
        expected = [out.tokens for out in full.sample(rows, NEW)]
        outputs = sampler.sample(rows, NEW)
        assert [out.tokens for out in outputs] == expected

        # Rests go on from one call of the loop to the next.
        *_, final = sampler._advance(*sampler._prefill(sampler._call(rows), NEW))
        for row, (prompt, tokens) in enumerate(zip(rows, expected, strict=True)):
            assert final.tokens[row, len(prompt) : final.length[row]].tolist() == tokens
        assert np.sum(final.drafted) == outputs[0].stats.drafted
        assert np.sum(final.verifications) == outputs[0].stats.verifications


def test_the_time_of_a_call_leaves_out_the_measurement_of_costs(plain, monkeypatch):
    import elastic_lm.decode.sampler as sampler_module

    def measure(*_):
        time.sleep(0.5)
        return CHEAP

    sampler = plain.sampler(window=WINDOW, lossless=True, lookup=True)
    sampler.sample([1, 2], NEW)
    monkeypatch.setattr(sampler_module, "tick_costs", measure)
    started = time.perf_counter()
    seconds = sampler.sample([1, 2], NEW).stats.seconds
    assert time.perf_counter() - started > seconds + 0.4


def test_costs_are_remembered_by_what_they_depend_on(plain, monkeypatch):
    """Longer caches, another batch and another place of the parameters are measured anew."""
    measured = []
    monkeypatch.setattr(costs, "_measured", {})
    monkeypatch.setattr(costs, "_measure", lambda *call: measured.append(call) or CHEAP)

    sampler = plain.sampler(window=WINDOW, lossless=True, lookup=True)
    for prompts, new in (([[1, 2]], 8), ([[1, 2, 3]], 8), ([[1, 2]], 32), ([[1, 2]] * 2, 8)):
        sampler._prefill(sampler._call(prompts), new)
    assert len(measured) == 3
    how = {"batch": 1, "capacity": 64, "greedy": True, "window": WINDOW}
    assert costs.measured_costs(plain.config, plain.params, **how) == (1.0,) * WINDOW
    with pytest.raises(KeyError):
        costs.measured_costs(plain.config, jax.device_get(plain.params), **how)


@pytest.mark.parametrize("committed", [False, True])
def test_measuring_compiles_nothing_that_the_call_does_not_need(plain, committed):
    params = jax.device_put(plain.params, jax.devices()[0]) if committed else plain.params
    window = 5 + committed  # of which no other test compiles anything
    sampler = Sampler(Decoder(plain.config), params, window=window, lossless=True, lookup=True)
    before = sampler.compilations()
    sampler.sample([1, 2], NEW)
    assert sampler.compilations() == before + 2  # prefill and the loop


def test_a_call_in_which_nothing_could_be_copied_is_refused(plain):
    with pytest.raises(ValueError, match=r"lookup=True: verifies nothing with missing='propagate'"):
        DecodeOptions(lookup=True, missing="propagate")

    sampler = plain.sampler(window=WINDOW, lookup=True)
    for lossless in (None, False, [False]):
        with pytest.raises(ValueError, match=r"^lookup=True: .*give lossless=True"):
            sampler.sample([[1, 2]], NEW, lossless=lossless)
    with pytest.raises(ValueError, match=r"^lookup=True: .*give lossless=True"):
        list(sampler.stream([1, 2], NEW))

    state = PromptState(hidden=None, kv=(), layers=0)
    with pytest.raises(ValueError, match=r"^lookup=True: prompt states go on without it"):
        sampler.sample([1, 2], NEW, lossless=True, prompt_state=state)


@pytest.mark.nightly
@pytest.mark.long
def test_exits_that_cost_more_than_they_bring_rest(with_exits, many_prompts, monkeypatch):
    """And no token differs, whether they are looked at or not."""
    import elastic_lm.decode.sampler as sampler_module

    prompts = many_prompts[16:20]
    full = [out.tokens for out in with_exits.sampler(window=WINDOW).sample(prompts, NEW)]
    sampler = with_exits.sampler((0.0, 2.0), window=WINDOW, lossless=True, lookup=True)
    by_exits = []
    for look in (0.0, 5.0):
        measured = dataclasses.replace(CHEAP, look=look, segment_shares=(0.0, 0.0, 0.1))
        monkeypatch.setattr(sampler_module, "tick_costs", lambda *_, measured=measured: measured)
        outputs = sampler.sample(prompts, NEW)
        assert [out.tokens for out in outputs] == full
        by_exits.append(sum(layers == 1 for out in outputs for layers in out.exit_layers))
    assert by_exits[1] < by_exits[0]


def test_the_balance_of_exits(with_exits):
    """Two passes for a token are too much, one is not; the second rest is twice as long."""
    sampler = with_exits.sampler((0.0, 2.0), window=WINDOW, lossless=True, lookup=True, draft=3)
    _, begun, _ = sampler._prefill(sampler._call([[1, 2], [3]]), NEW)
    asking_B = np.asarray([True, True])

    def after(state, passes, copied=False):
        """One iteration in which both rows gain a token."""
        spent = exit_balance.spend(state, jnp.float32(passes))
        new = dataclasses.replace(spent, length=state.length + 1, ticks=state.ticks + 1)
        return exit_balance.settle(new, state, asking_B, jnp.asarray(copied))

    state = begun
    for _ in range(50):
        state = after(state, 1.0)
        assert not exit_balance.exits_rest(state)

    state = after(begun, 100.0, copied=True)
    assert not exit_balance.exits_rest(state)
    for rest in (exit_balance.FIRST_REST, 2 * exit_balance.FIRST_REST):
        iterations = 0
        while not exit_balance.exits_rest(state):
            state = after(state, 2.0)
            iterations += 1
        assert iterations <= 3
        assert state.lookup.exits.rest == rest
        for _ in range(rest):
            assert exit_balance.exits_rest(state)
            state = after(state, 1.0)

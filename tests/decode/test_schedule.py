"""What is foreseen of the loop is what the loop does."""

import dataclasses

import jax
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig
from elastic_lm.decode import sampler
from elastic_lm.decode.schedule import KnownText, foresee
from elastic_lm.decode.tick_costs import TickCosts
from elastic_lm.depth.confidence import confidence
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config

NEW, WINDOW = 24, 8
EXIT = (ExitConfig(1, "norm", tied=True),)


def repeating(make_model, exits=()):
    """A model whose own greedy text soon repeats itself, in part."""
    config = dataclasses.replace(tiny_config(n_layers=3), exits=exits)
    params = jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, init_params(config, jax.random.key(0)))
    return make_model(config, params)


def total(schedule, field):
    """How many iterations ran a tick."""
    return sum(count for kind, count in schedule.iterations.items() if getattr(kind, field))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.long
def test_ticks_are_those_of_the_loop(make_model, prompts, rows):
    model = repeating(make_model, EXIT)
    [first] = model.sampler(window=WINDOW).sample(prompts[1:2], NEW, temperature=1.0)
    sure = confidence("max_prob", model.forward(np.asarray([first.tokens])).exit_logits[0])
    policy = [float(np.median(sure))]
    found = model.sampler(policy, window=WINDOW).sample(prompts[1 : 1 + rows], NEW, temperature=1.0)
    leaves = [np.asarray(sample.exit_layers) == 1 for sample in found]
    assert 0.05 < np.mean(leaves) < 0.95

    texts = [
        KnownText(prompt, sample.tokens, left, left)
        for prompt, sample, left in zip(prompts[1 : 1 + rows], found, leaves, strict=True)
    ]
    schedule = foresee(texts, window=WINDOW, exits=True)
    assert (total(schedule, "shallow"), total(schedule, "deep")) == found[0].stats.segment_ticks
    assert schedule.tokens == rows * NEW


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.long)])
def test_drafts_are_those_of_the_loop(make_model, prompts, rows):
    model = repeating(make_model, EXIT)
    some = prompts[1 : 1 + rows]
    full = model.sampler(window=WINDOW).sample(some, NEW)
    # Every token leaves, whatever stands before it, so that drafts behind a wrong one are foreseen as well.
    drafted = model.sampler([0.0], window=WINDOW, lossless=True).sample(some, NEW)
    assert [s.tokens for s in drafted] == [s.tokens for s in full]

    texts = []
    for prompt, sample in zip(some, full, strict=True):
        exit_logits = model.forward(np.asarray([[*prompt, *sample.tokens]])).exit_logits[0][0]
        likeliest = np.argmax(np.asarray(exit_logits), axis=-1)[len(prompt) - 1 : -1]
        texts.append(
            KnownText(prompt, sample.tokens, np.ones(NEW, bool), likeliest == np.asarray(sample.tokens))
        )
    schedule = foresee(texts, window=WINDOW, exits=True, lossless=True)
    stats = drafted[0].stats
    assert (schedule.drafted, schedule.accepted) == (stats.drafted, stats.accepted)
    assert schedule.verifications == stats.verifications
    assert (total(schedule, "shallow"), total(schedule, "deep")) == stats.segment_ticks


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.long)])
def test_copies_are_those_of_the_loop(make_model, prompts, rows, monkeypatch):
    # A search takes a tenth of a pass, so that rests of up to nine iterations follow those in vain.
    costs = TickCosts(tuple(1.0 + 0.05 * i for i in range(WINDOW)), search=0.1)
    monkeypatch.setattr(sampler, "tick_costs", lambda *_: costs)
    model = repeating(make_model)
    some = [prompt * 2 for prompt in prompts[1 : 1 + rows]]
    copying = model.sampler(window=WINDOW, lossless=True, lookup=True).sample(some, NEW, ignore_eos=True)
    texts = [KnownText(p, s.tokens) for p, s in zip(some, copying, strict=True)]
    how = {"window": WINDOW, "exits": False, "lossless": True, "config": model.config}
    schedule = foresee(texts, **how, lookup=costs)
    stats = copying[0].stats
    assert (schedule.drafted, schedule.accepted) == (stats.drafted, stats.accepted)
    assert schedule.accepted > 0
    assert schedule.verifications == stats.verifications
    with pytest.raises(ValueError, match="config=None"):
        foresee(texts, **{**how, "config": None}, lookup=costs)


def test_a_full_window_reads_no_head():
    text = KnownText([1], list(range(8)), np.ones(8, bool), np.ones(8, bool))
    kinds = foresee([text], window=4, exits=True).iterations
    assert {tuple(kind): count for kind, count in kinds.items()} == {
        (1, True, 0, False): 6,
        (1, True, 4, False): 2,
    }

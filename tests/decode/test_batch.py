"""A row's tokens and depths depend on nothing but the row."""

import itertools

import pytest

NEW = 20
LONG_2 = pytest.param(2, marks=(pytest.mark.long, pytest.mark.nightly))
LONG_8 = pytest.param(8, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def expected(model, prompts, mixed):
    policies = [*mixed, (0.0, 0.0), (2.0, 2.0), (2.0, mixed[1][1]), (mixed[1][0], 2.0)]
    return {t: [model.reference(p, NEW, t) for p in prompts] for t in policies}


def test_policies_use_every_depth(expected, mixed):
    depths = {d for t in mixed for _, row in expected[t] for d in row}
    assert depths == {1, 2, 3}


@pytest.mark.parametrize("window", [1, LONG_2, 4, LONG_8])
def test_one_row_equals_full_recomputation(model, prompts, expected, window):
    for thresholds, rows in expected.items():
        sampler = model.sampler(thresholds, window=window)
        for prompt, (tokens, depths) in zip(prompts, rows, strict=True):
            out = sampler.sample(prompt, NEW)
            assert (out.tokens, out.exit_layers) == (tokens, depths)


@pytest.mark.parametrize("window", [LONG_2, 4, LONG_8])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_batch_equals_single_rows(model, prompts, expected, size, window):
    for (thresholds, rows), share in itertools.product(expected.items(), [0.0, 1.0]):
        sampler = model.sampler(thresholds, window=window, fire_share=share)
        outputs = sampler.sample(prompts[:size], NEW)
        assert [(o.tokens, o.exit_layers) for o in outputs] == rows[:size]


def test_firing_rule_runs_the_deepest_segment_less_often(model, prompts, mixed):
    def deepest_ticks(thresholds, share):
        outputs = model.sampler(thresholds, window=8, fire_share=share).sample(prompts, NEW)
        return outputs[0].stats.segment_ticks[-1]

    for thresholds in mixed:
        assert deepest_ticks(thresholds, 1.0) < deepest_ticks(thresholds, 0.0)


@pytest.mark.parametrize("metric", ["margin", "entropy"])
def test_metric_is_traced(model, prompts, metric):
    thresholds = (0.4, 0.5)
    before = model.sampler().sample(prompts[1], NEW) and model.sampler().compilations()
    out = model.sampler(thresholds, metric).sample(prompts[1], NEW)
    assert (out.tokens, out.exit_layers) == model.reference(prompts[1], NEW, thresholds, metric)
    assert model.sampler().compilations() == before


def test_first_exit_always_and_never(model, prompts, expected):
    always = model.sampler((0.0, 0.0)).sample(prompts[3], NEW)
    never = model.sampler((1.5, 1.5)).sample(prompts[3], NEW)
    assert set(always.exit_layers) == {1}
    assert set(never.exit_layers) == {3}
    assert never.tokens == model.sampler().sample(prompts[3], NEW).tokens == expected[(2.0, 2.0)][3][0]


def test_rows_end_on_their_own(model, prompts, expected, mixed):
    rows = expected[mixed[1]]
    stop = rows[0][0][4]
    outputs = model.sampler(mixed[1]).sample(prompts[:3], NEW, stop_tokens=(stop,))
    for output, (tokens, _) in zip(outputs, rows, strict=False):
        end = tokens.index(stop) + 1 if stop in tokens else NEW
        assert output.tokens == tokens[:end]
    assert len(outputs[0].tokens) <= 5


def test_compiles_once_per_bucket(model, prompts, mixed):
    sampler = model.sampler(mixed[0])
    sampler.sample(prompts[0], 8)
    before = sampler.compilations()
    for prompt, thresholds in itertools.product(prompts, [*mixed, (0.0, 2.0), (2.0, 0.5)]):
        other = model.sampler(thresholds, fire_share=0.5)
        other.sample(prompt, 5, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=3)
        other.sample(prompt, 7, repetition_penalty=1.3, stop_tokens=(1, 2, 3))
    assert sampler.compilations() == before

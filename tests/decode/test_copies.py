"""Several samples per prompt: each is what its seed gives alone, in whatever batch."""

import itertools

import pytest

NEW = 8


@pytest.mark.long
def test_samples_are_those_of_their_seeds(model, prompts, mixed) -> None:
    """The prompt is processed once, the rows share nothing else."""
    sampler = model.sampler(mixed[1])
    groups = sampler.sample(prompts[:2], NEW, n=2, temperature=1.0, seed=7)
    assert [len(group) for group in groups] == [2, 2]
    for i, k in itertools.product(range(2), range(2)):
        alone = sampler.sample(prompts[i], NEW, temperature=1.0, seed=7 + 2 * i + k)
        assert groups[i][k].tokens == alone.tokens
        assert groups[i][k].exit_layers == alone.exit_layers
    assert len({tuple(sample.tokens) for group in groups for sample in group}) == 4


@pytest.mark.long
def test_settings_of_prompts_are_those_of_all_their_samples(model, prompts, mixed) -> None:
    sampler = model.sampler(mixed[1])
    how = {"temperature": [1.0, 0.5], "top_k": [0, 5], "seed": [3, 2**32 - 1]}
    exits = [sampler.options.exit, None]
    groups = sampler.sample(prompts[:2], NEW, n=2, exit=exits, **how)
    for i, k in itertools.product(range(2), range(2)):
        own = {name: values[i] for name, values in how.items()}
        own["seed"] = (own["seed"] + k) % 2**32
        alone = sampler.sample(prompts[i], NEW, exit=exits[i], **own)
        assert groups[i][k].tokens == alone.tokens


@pytest.mark.long
def test_one_prompt_gives_a_list(model, prompts) -> None:
    samples = model.sampler().sample(prompts[1], NEW, n=4, temperature=1.0)
    assert len(samples) == 4
    assert samples[0].tokens != samples[1].tokens
    (only,) = model.sampler().sample(prompts[1], NEW, n=1)
    assert only.tokens == model.sampler().sample(prompts[1], NEW).tokens


REFUSED = [
    ({"n": 0}, "n=0: must be at least 1"),
    ({"n": 2.0}, "n=2.0"),
    ({"n": 2}, "n=2: greedy samples are all the same"),
    ({"n": 2, "temperature": [1.0, 0.0]}, "greedy samples are all the same"),
    ({"n": 2, "temperature": [1.0] * 4}, r"one per prompt \(2\)"),
    ({"n": 2, "temperature": 1.0, "exit": [None] * 4}, r"one per prompt \(2\)"),
]


@pytest.mark.parametrize(("how", "why"), REFUSED)
def test_refusals(model, prompts, how, why) -> None:
    with pytest.raises(ValueError, match=why):
        model.sampler().sample(prompts[:2], NEW, **how)

"""What is kept between calls changes no token, no depth, and compiles nothing per call."""

import dataclasses

import jax
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig, RopeConfig
from elastic_lm.decode.prefix import PrefixCache, extensions
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import Decoder
from elastic_lm.testing import random_params, tiny_config

NEW = 8


def turns(seed: int, count: int, last: list[int]) -> list[int]:
    """The last text and some more tokens."""
    return [*last, *np.random.default_rng(seed).integers(0, 64, count).tolist()]


def talk(sampler, begin: list[int], extra=(3, 1, 20), **how):
    """Turns with a prefix, each compared with the same from scratch."""
    prefix, text = PrefixCache(), begin
    for i, count in enumerate(extra):
        kept = len(prefix.tokens)
        with_prefix = sampler.sample(text, NEW, prefix=prefix, **how)
        alone = sampler.sample(text, NEW, **how)
        assert with_prefix.tokens == alone.tokens
        if not sampler.options.lossless:
            assert with_prefix.exit_layers == alone.exit_layers
        assert prefix.reused == min(kept, len(text) - 1)
        text = turns(i, count, [*text, *with_prefix.tokens])
    return prefix


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 3}])
def test_turns_equal_those_from_scratch(model, prompts, mixed, how) -> None:
    prefix = talk(model.sampler(mixed[1]), prompts[2], **how)
    assert prefix.reused >= len(prompts[2]) + NEW  # what was written is kept, too


@pytest.mark.long
def test_lossless_turns_equal_those_from_scratch(model, prompts, mixed) -> None:
    talk(model.sampler(mixed[0], lossless=True), prompts[2])


@pytest.mark.long
def test_approximate_keys_and_values_are_not_kept(model, prompts, mixed) -> None:
    """With CALM's approximation, what a text has written is read again by the full model."""
    sampler, prefix = model.sampler(mixed[0], missing="propagate"), PrefixCache()
    first = sampler.sample(prompts[3], NEW, prefix=prefix)
    assert len(prefix.tokens) == len(prompts[3]) - 1
    text = turns(1, 3, [*prompts[3], *first.tokens])
    assert sampler.sample(text, NEW, prefix=prefix).tokens == sampler.sample(text, NEW).tokens


@pytest.mark.nightly
@pytest.mark.long
def test_windows_and_learned_positions_go_on(make_model) -> None:
    config = tiny_config(n_layers=2, exits=(1,), position="learned")
    sliding = dataclasses.replace(tiny_config(n_layers=2, exits=(1,)), windows=(8, 0))
    for one in (config, sliding):
        sampler = Sampler(Decoder(one), random_params(one))
        talk(sampler, [1, 2, 3, 4, 5], extra=(9, 2, 1))


def test_a_text_that_changes_is_read_from_there_on(model, prompts) -> None:
    sampler, prefix = model.sampler(), PrefixCache()
    sampler.sample(prompts[5], NEW, prefix=prefix)
    for changed in (10, 0):
        text = [*prompts[5][:changed], 63, 62, 61, *prompts[5][changed:]]
        assert sampler.sample(text, NEW, prefix=prefix).tokens == sampler.sample(text, NEW).tokens
        assert prefix.reused == changed
    # The very text of before has its last token left to read.
    assert sampler.sample(text, NEW, prefix=prefix).tokens == sampler.sample(text, NEW).tokens
    assert prefix.reused == len(text) - 1


@pytest.mark.long
def test_longrope_takes_nothing_over_its_switch() -> None:
    """Keys of a text within the original context are rotated otherwise than those of a longer one."""
    config = tiny_config(n_layers=2, max_len=256)
    pairs = config.rotary_dim // 2
    factors = {"short_factors": (1.0,) * pairs, "long_factors": (8.0,) * pairs, "factor": 8.0}
    rope = RopeConfig(scaling="longrope", original_max_len=32, **factors)
    config = dataclasses.replace(config, rope=rope, exits=(ExitConfig(1, "block", tied=True),))
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, random_params(config))
    sampler, prefix = Sampler(Decoder(config), params), PrefixCache()

    text = turns(0, 60, [])
    reused = []
    # Across the switch, on above it, anew from within the original context's length, and back.
    for prompt in (text[:20], text[:50], text, [*text[:10], *text[20:60]], text[:20], text[:24]):
        known = sampler.sample(prompt, NEW, prefix=prefix, logprobs=True)
        alone = sampler.sample(prompt, NEW, logprobs=True)
        assert known.tokens == alone.tokens
        np.testing.assert_allclose(known.logprobs, alone.logprobs, atol=1e-4)
        reused.append(prefix.reused)
    assert reused == [0, 0, 50, 10, 0, 20]


@pytest.mark.long
def test_longer_texts_get_more_room_and_nothing_is_compiled_per_turn(model, prompts) -> None:
    sampler = model.sampler()

    def conversation() -> int:
        prefix, text = PrefixCache(), [1, 2, 3]
        for i in range(6):
            text = [*text, *sampler.sample(text, NEW, prefix=prefix).tokens]
            text = turns(i, 2 + i, text)
        return sampler.compilations() + extensions()

    before = conversation()
    assert conversation() == before


def test_a_stream_that_is_broken_off_leaves_what_it_has(model, prompts) -> None:
    sampler, prefix = model.sampler(stream_every=1), PrefixCache()
    pieces = sampler.stream_samples(prompts[2], 20, prefix=prefix)
    for _ in range(5):
        sample = next(pieces)
    assert not prefix.tokens  # in use
    pieces.close()
    assert len(prompts[2]) <= len(prefix.tokens) < len(prompts[2]) + 20
    text = turns(0, 2, [*prompts[2], *sample.tokens])
    assert sampler.sample(text, NEW, prefix=prefix).tokens == sampler.sample(text, NEW).tokens
    assert prefix.reused >= len(prompts[2])


def test_another_model_begins_anew(model, prompts) -> None:
    prefix = PrefixCache()
    model.sampler().sample(prompts[2], NEW, prefix=prefix)
    other = model.sampler()
    assert other.sample(prompts[2], NEW, prefix=prefix).tokens == other.sample(prompts[2], NEW).tokens
    assert prefix.reused == 0


def test_refusals(model, prompts) -> None:
    with pytest.raises(ValueError, match="holds one text, and this call has 2 rows"):
        model.sampler().sample(prompts[:2], NEW, prefix=PrefixCache())
    with pytest.raises(ValueError, match="holds one text, and this call has 3 rows"):
        model.sampler().sample(prompts[1], NEW, n=3, temperature=1.0, prefix=PrefixCache())

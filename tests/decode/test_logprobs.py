"""Log-probabilities are those of a full forward pass, of the head that gave each token, whatever decodes."""

import jax
import numpy as np
import pytest

from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import Decoder
from elastic_lm.testing import random_params, tiny_config

NEW, TOP = 10, 3


def check(model, prompts, samples, most_verified: bool = False) -> set[int]:
    """Compares with one pass over prompt and continuation; returns the depths that were seen."""
    depths = set()
    layers = [*(e.layer for e in model.config.exits), model.config.n_layers]
    for prompt, sample in zip(prompts, samples, strict=True):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(prompt) + len(sample.tokens)] = [*prompt, *sample.tokens]
        output = model.forward(tokens)
        heads = dict(zip(layers, (*output.exit_logits, output.logits), strict=True))
        assert len(sample.logprobs) == len(sample.top_logprobs) == len(sample.tokens)
        for i, (token, depth) in enumerate(zip(sample.tokens, sample.exit_layers, strict=True)):
            head = heads[layers[-1] if most_verified else depth]
            expected = np.asarray(jax.nn.log_softmax(head[0, len(prompt) + i - 1]))
            np.testing.assert_allclose(sample.logprobs[i], expected[token], atol=2e-5)
            ids, values = zip(*sample.top_logprobs[i], strict=True)
            np.testing.assert_allclose(values, np.sort(expected)[::-1][:TOP], atol=2e-5)
            np.testing.assert_allclose(expected[list(ids)], values, atol=2e-5)
            depths.add(depth)
    return depths


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_early_tokens_have_those_of_their_exits(model, prompts, mixed, temperature) -> None:
    how = {"logprobs": True, "top_logprobs": TOP, "temperature": temperature, "repetition_penalty": 1.2}
    samples = model.sampler(mixed[1]).sample(prompts[:4], NEW, top_k=20, **how)
    assert check(model, prompts[:4], samples) == {1, 2, 3}


@pytest.mark.long
def test_verified_tokens_have_those_of_the_full_model(model, prompts, mixed) -> None:
    sampler = model.sampler(mixed[0], lossless=True)
    samples = sampler.sample(prompts[:4], NEW, top_logprobs=TOP)
    depths = check(model, prompts[:4], samples, most_verified=True)
    assert depths - {3}  # some drafts were right
    assert samples[0].stats.wasted > 0
    # Asking changes nothing else.
    assert [s.tokens for s in samples] == [s.tokens for s in sampler.sample(prompts[:4], NEW)]


@pytest.mark.long
def test_verified_and_other_rows_of_a_batch(model, prompts, mixed) -> None:
    sampler, lossless = model.sampler(mixed[0]), [True, False, True, False]
    samples = sampler.sample(prompts[:4], NEW, top_logprobs=TOP, lossless=lossless)
    assert check(model, prompts[0:4:2], samples[0::2], most_verified=True) - {3}
    assert check(model, prompts[1:4:2], samples[1::2]) - {3}


@pytest.mark.long
def test_copied_tokens_have_those_of_the_full_model(make_model) -> None:
    config = tiny_config(n_layers=2)
    plain = make_model(config, random_params(config))
    sampler = Sampler(Decoder(config), plain.params, lossless=True, lookup=True, draft=3, window=4)
    prompts = [[1, 2, 3, 4] * 5, [5, 6] * 4]
    samples = sampler.sample(prompts, 24, top_logprobs=TOP)
    check(plain, prompts, samples, most_verified=True)
    assert samples[0].stats.drafted > 0


@pytest.mark.long
def test_none_are_there_where_none_are_asked_for(model, prompts) -> None:
    sampler = model.sampler()
    (sample,) = sampler.sample(prompts[:1], 4)
    assert sample.logprobs is None
    assert sample.top_logprobs is None
    (sample,) = sampler.sample(prompts[:1], 4, logprobs=True)
    assert sample.top_logprobs is None
    before = sampler.compilations()
    sampler.sample(prompts[1:2], 4, logprobs=True, temperature=1.0)
    assert sampler.compilations() == before


@pytest.mark.long
def test_texts_that_stop_early_have_one_per_token(model, prompts) -> None:
    (full,) = model.sampler().sample(prompts[:1], NEW)
    (sample,) = model.sampler().sample(prompts[:1], NEW, logprobs=True, stop_tokens=(full.tokens[3],))
    assert len(sample.logprobs) == len(sample.tokens) <= 4


def test_refusals(model) -> None:
    for value in (-1, 65, 1.5, True):
        with pytest.raises(ValueError, match="top_logprobs"):
            model.sampler().sample([1], 2, top_logprobs=value)
    with pytest.raises(ValueError, match="logprobs"):
        model.sampler().sample([1], 2, logprobs=3)

"""Generated text is compared with the full model's choices, and degenerate text is told from sound text."""

import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.decode import generated
from elastic_lm.decode.generated import GeneratedText, compare, repeated_share
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.models.decoder import Decoder
from elastic_lm.testing import random_params, tiny_config

CONFIG = tiny_config(exits=(1,), n_layers=3)
PROMPTS = [[3, 1, 4, 1], [5, 9]]


def full_choice(params, tokens: list[int]) -> int:
    """The full model's next token, one text at a time."""
    logits = Decoder(CONFIG).apply({"params": params}, jnp.asarray([tokens])).logits
    return int(jnp.argmax(logits[0, -1]))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, scale=0.3)


@pytest.mark.nightly
@pytest.mark.long
def test_agreement_is_counted_token_by_token(params) -> None:
    texts = [[2, 7, 1], [8, full_choice(params, [5, 9, 8]), 8, 2]]  # not equally long
    expected = [
        full_choice(params, [*prompt, *text[:i]]) == text[i]
        for prompt, text in zip(PROMPTS, texts, strict=True)
        for i in range(len(text))
    ]
    agrees = generated.agreeing(CONFIG, params, PROMPTS, texts)
    np.testing.assert_array_equal(agrees, expected)
    assert True in expected
    assert False in expected
    found = compare(CONFIG, params, PROMPTS, texts, texts)
    assert (found.tokens, found.agreement) == (7, np.mean(expected))


def test_full_depth_agrees_with_itself_and_early_tokens_need_not(params) -> None:
    sampler = Sampler(Decoder(CONFIG), params, window=2, exit=ConfidenceExit("max_prob", (2.0,), (1,)))
    assert generated.measure(sampler, PROMPTS, 8).agreement == 1.0
    early = Sampler(Decoder(CONFIG), params, window=2, exit=ConfidenceExit("max_prob", (0.0,), (1,)))
    found = generated.measure(early, PROMPTS, 8)
    assert found.agreement < 1
    assert found.bound > found.agreement
    assert found.tokens == 16


def test_repeats_are_runs_that_occurred_before() -> None:
    assert repeated_share([1, 2, 3, 4, 5, 6]) == 0
    assert repeated_share([7] * 8) == pytest.approx(1 - 1 / 5)
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([1, 2]) == 0


@pytest.mark.parametrize(
    ("found", "target", "reason"),
    [
        (GeneratedText(256, 0.97, 0.99, 0.1, 0.1), 0.95, ""),
        (GeneratedText(256, 0.80, 0.86, 0.1, 0.1), 0.95, "agreement is 80.00% on the text that it generates"),
        (GeneratedText(256, 0.80, 0.86, 0.1, 0.1), 0.90, ""),  # within the slack
        (GeneratedText(16, 0.80, 0.96, 0.1, 0.1), 0.95, ""),  # too little text to say
        (GeneratedText(256, 0.97, 0.99, 0.9, 0.1), 0.95, "its text loops: 90% of all runs"),
        (GeneratedText(256, 0.97, 0.99, 0.9, 0.8), 0.95, ""),  # full depth's text loops too
    ],
)
def test_what_is_degenerate(found: GeneratedText, target: float, reason: str) -> None:
    assert found.degenerate(target).startswith(reason)
    assert bool(found.degenerate(target)) == bool(reason)


def test_the_bound_is_above_the_share_and_falls_with_more_text(params) -> None:
    text = [full_choice(params, PROMPTS[0])]
    wrong = [(text[0] + 1) % CONFIG.vocab_size]
    few = compare(CONFIG, params, PROMPTS[:1], [wrong], [text])
    assert few.agreement == 0
    assert few.bound == pytest.approx(1 - generated.EPSILON)  # no success in one trial
    many = compare(CONFIG, params, PROMPTS[:1] * 5, [wrong] * 5, [text] * 5)
    assert many.bound == pytest.approx(1 - generated.EPSILON ** (1 / 5))

"""The sampler's text side: prompts, stop strings, streaming, statistics, refusals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.decode.results import held_back
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.encoder import Encoder


class Letters:
    """One character per token, after a beginning-of-text token that decodes to "0"."""

    def encode(self, text, *, bos=False):
        return [0] * bos + [ord(c) - 48 for c in text]

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)


@pytest.fixture
def sampler(model):
    return Sampler(Decoder(model.config), model.params, Letters(), stream_every=3)


def test_text_is_the_decoded_continuation(sampler):
    out = sampler.sample("hello", 20)
    assert out.text == Letters().decode(out.tokens)
    assert len(out.tokens) == 20


def test_batch_of_text_keeps_order(sampler):
    texts = ["a", "bcd", "efghijk"]
    assert [o.text for o in sampler.sample(texts, 9)] == [sampler.sample(t, 9).text for t in texts]


def test_stream_gives_the_same_text_in_pieces(sampler):
    pieces = list(sampler.stream("hello", 20))
    assert "".join(pieces) == sampler.sample("hello", 20).text
    assert len(pieces) > 3


def test_stop_string_cuts_text(sampler):
    whole = sampler.sample("hello", 20).text
    stop = whole[7:9]
    cut = whole[: whole.index(stop)]
    assert sampler.sample("hello", 20, stop=stop).text == cut
    assert "".join(sampler.stream("hello", 20, stop=(stop,))) == cut


def test_stop_string_ends_a_row_alone_as_in_a_batch(sampler):
    texts = ["a", "bcd", "efghijk"]
    stop = sampler.sample(texts[1], 20).text[4:6]
    batch = sampler.sample(texts, 20, stop=stop)
    single = [sampler.sample(t, 20, stop=stop) for t in texts]
    assert [(b.tokens, b.exit_layers) for b in batch] == [(s.tokens, s.exit_layers) for s in single]
    assert Letters().decode(batch[1].tokens).endswith(stop)
    assert len(batch[1].exit_layers) == len(batch[1].tokens) <= 6


def test_text_starts_after_the_beginning_of_text_token(sampler):
    assert sampler.sample("hello", 9).tokens == sampler.sample([0, *Letters().encode("hello")], 9).tokens


def test_statistics_add_up(model, prompts, mixed):
    outputs = model.sampler(mixed[1]).sample(prompts[:3], 12)
    stats = outputs[0].stats
    depths = [d for o in outputs for d in o.exit_layers]
    assert stats.tokens == len(depths) == 36
    assert stats.mean_layers == pytest.approx(sum(depths) / 36)
    assert stats.exit_counts == {d: depths.count(d) for d in sorted(set(depths))}
    assert stats.prompt_tokens == sum(map(len, prompts[:3]))


@pytest.mark.parametrize(
    ("prompt", "new", "settings", "message"),
    [
        ("", 5, {}, "prompt 0 is empty"),
        ([], 5, {}, "at least one prompt"),
        ([[1], []], 5, {}, "prompt 1 is empty"),
        ([1] * 120, 20, {}, "prompt 0 has 120 tokens .* max_len=128"),
        ([1, 64], 5, {}, "token id 64, outside the vocabulary of 64"),
        ([1], 0, {}, "max_new_tokens=0"),
        ([1], 5, {"topk": 3}, "unknown setting topk=3"),
        ([1], 5, {"seed": 1.5}, "seed=1.5: must be finite whole numbers"),
        ([1], 5, {"seed": 2**32}, "seed=4294967296: must be an integer from 0 to 4294967295"),
        ([1], 5, {"seed": -1}, "seed=-1: must be an integer"),
        ([1], 5, {"top_k": 2**32 + 1}, "top_k=4294967297: must be an integer from 0 to 2147483647"),
        ([1], 5, {"top_k": 2**31}, "top_k=2147483648: must be an integer"),
        ([1], 5, {"top_k": 2**70}, "top_k=1180591620717411303424: must be finite whole numbers"),
        ([[1], [2]], 5, {"top_k": [1, 1.5]}, r"top_k=\[1, 1.5\]: must be finite whole numbers"),
        ([1], 5, {"top_k": True}, "top_k=True: must be finite whole numbers"),
        ([1], 5, {"stop_tokens": (-1,)}, "stop_tokens holds token id -1, outside the vocabulary"),
        (
            [1],
            5,
            {"stop_tokens": (10**12,)},
            "stop_tokens holds token id 1000000000000, outside",
        ),
        ([1], 2**31, {}, r"max_new_tokens=2147483648: must be at least 1, and below 2\*\*31"),
        ([1], 5, {"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ([1], 5, {"stop": ""}, "stop='': a stop string needs at least one character"),
    ],
)
def test_bad_input_is_named(sampler, prompt, new, settings, message):
    with pytest.raises(ValueError, match=message):
        sampler.sample(prompt, new, **settings)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_prompts_may_be_arrays(sampler, prompts, array):
    expected = sampler.sample(prompts[0], 4).tokens
    assert sampler.sample(array(prompts[0]), 4).tokens == expected
    assert [s.tokens for s in sampler.sample(array([prompts[0]]), 4)] == [expected]


@pytest.mark.parametrize(
    "bad",
    [{"window": 0}, {"fire_share": 2.0}, {"stream_every": 0}, {"stream_every": 2**31}, {"window": 2**40}],
)
def test_bad_construction_is_named(model, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        model.sampler(**bad)


def test_caches_that_no_machine_holds_are_refused(model):
    config = dataclasses.replace(model.config, max_len=2**31 - 1)
    sampler = Sampler(Decoder(config), model.params)
    with pytest.raises(ValueError, match=r"max_new_tokens=1000000000: the caches would take .* GiB"):
        sampler.sample([[1]] * 64, 10**9)


def test_text_without_tokenizer_is_refused(model):
    with pytest.raises(ValueError, match="tokenizer=None"):
        model.sampler().sample("text", 4)


def test_stop_string_without_tokenizer_is_refused(model):
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        model.sampler().sample([1, 2], 4, stop="x")


def test_held_back_waits_for_whole_characters_and_stop_strings():
    assert held_back("caf\ufffd", ()) == "caf"
    assert held_back("one\n", ("\n\n",)) == "one"
    assert held_back("one", ("\n\n",)) == "one"


def test_a_model_that_is_no_decoder_is_refused() -> None:
    config = EncoderConfig(vocab_size=20, d_model=8, n_layers=1, n_heads=2, d_mlp=8, max_len=8)
    with pytest.raises(ValueError, match=r"model=Encoder: a sampler needs a decoder; use el\.TextToText"):
        Sampler(Encoder(config), {})

"""A conversation gives, turn by turn, what its whole text gives from scratch."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig, RopeConfig
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.decode.chat import Chat
from elastic_lm.decode.prefix import extensions
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.confidence import confidence
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params
from elastic_lm.testing import all_logits, random_tokens, tiny_config

APPENDING = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Shows only how earlier answers begin.
REWRITING = APPENDING.replace("m.content +", "(m.content[:2] if m.role == 'assistant' else m.content) +")
SAID = ("What is the capital of France?", "And now?", "Why is that so, in more than a few words of yours?")
NEW = 12


def save_chat_tokenizer(folder: Path, template: str | None) -> Tokenizer:
    """A tokenizer of 320 ids at most, whose turns end with a special token."""
    tokenizer = train_bpe(["user assistant system What is the capital of France? And now? Why so" * 3], 300)
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|im_end|>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    place = tmp_path_factory.mktemp("tokenizers")
    templates = {"appending": APPENDING, "rewriting": REWRITING, "none": None}
    return {name: save_chat_tokenizer(place / name, text) for name, text in templates.items()}


@pytest.fixture(scope="module")
def talker():
    sizes = {"vocab_size": 320, "max_len": 512, "n_layers": 2}
    config = dataclasses.replace(tiny_config(**sizes), exits=(ExitConfig(1, "norm", tied=True),))
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, params)
    # About half of all tokens leave early.
    logits = all_logits(config, params, random_tokens(config, 4, 32))[1]
    half = float(np.median(confidence("max_prob", logits)))
    return config, params, ConfidenceExit("max_prob", thresholds=(half,), layers=(1,))


def sampler_of(talker, tokenizer: Tokenizer, **options) -> Sampler:
    config, params, early = talker
    return Sampler(Decoder(config), params, tokenizer, exit=early, **options)


@pytest.mark.parametrize("template", ["appending", "rewriting"])
@pytest.mark.parametrize(
    ("options", "how"),
    [
        pytest.param({}, {}, id="greedy"),
        pytest.param({}, {"temperature": 1.0, "seed": 3}, id="drawn"),
        pytest.param({"lossless": True}, {}, id="lossless", marks=(pytest.mark.long, pytest.mark.nightly)),
    ],
)
def test_three_turns_equal_those_from_scratch(talker, tokenizers, template, options, how) -> None:
    sampler = sampler_of(talker, tokenizers[template], **options)
    chat = Chat(sampler, system="Be short.", max_new_tokens=NEW, **how)
    depths, stops = set(), {"stop_tokens": tokenizers[template].eos_ids}
    for turn, said in enumerate(SAID):
        prompt = chat.prompt(said)
        answer = chat.send(said)
        alone = sampler.sample(prompt, NEW, **how, **stops)
        assert answer.tokens == alone.tokens
        assert answer.text == alone.text
        if not options:
            assert answer.exit_layers == alone.exit_layers
        depths |= set(answer.exit_layers)
        assert chat.history[-2:] == [
            {"role": "user", "content": said},
            {"role": "assistant", "content": answer.text},
        ]
        assert (chat.reused > len(prompt) // 3) == (turn > 0)
    assert depths == {1, 2}


def test_streamed_turns_are_the_same_and_compile_nothing(talker, tokenizers) -> None:
    sampler = sampler_of(talker, tokenizers["appending"], stream_every=3)
    chat = Chat(sampler, max_new_tokens=NEW)
    answers = [chat.send(said).text for said in SAID]
    before = sampler.compilations() + extensions()
    chat.reset()
    assert chat.history == []
    for said, answer in zip(SAID, answers, strict=True):
        pieces = list(chat.stream(said))
        assert "".join(pieces) == answer
    assert sampler.compilations() + extensions() == before


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(talker, tokenizers) -> None:
    sampler = sampler_of(talker, tokenizers["appending"], stream_every=1)
    chat = Chat(sampler, max_new_tokens=NEW)
    answer = chat.stream(SAID[0])
    piece = next(answer)
    answer.close()
    assert chat.history[1] == {"role": "assistant", "content": piece}
    prompt = chat.prompt(SAID[1])
    assert chat.send(SAID[1]).tokens == sampler.sample(prompt, NEW).tokens


def test_a_history_can_be_given_and_changed(talker, tokenizers) -> None:
    sampler = sampler_of(talker, tokenizers["appending"])
    first = Chat(sampler, max_new_tokens=NEW)
    first.send(SAID[0])
    answer = first.send(SAID[1])
    second = Chat(sampler, history=first.history[:2], max_new_tokens=NEW)
    assert second.send(SAID[1]).tokens == answer.tokens
    del first.history[2:]
    assert first.send(SAID[1]).tokens == answer.tokens
    first.history[1]["content"] = "Paris."
    prompt = first.prompt(SAID[2])
    assert first.send(SAID[2]).tokens == sampler.sample(prompt, NEW).tokens


def test_what_fails_leaves_the_history_as_it_was(talker, tokenizers) -> None:
    chat = Chat(sampler_of(talker, tokenizers["appending"]), max_new_tokens=NEW)
    with pytest.raises(ValueError, match=r"the conversation has [0-9]+ tokens, which leave no room"):
        chat.send("too long " * 300)
    with pytest.raises(ValueError, match="unknown setting"):
        chat.send(SAID[0], warmth=1)
    assert chat.history == []
    # Where there is some room, the answer is as long as fits.
    said = "a" * (512 - 5 - len(chat.prompt("")))
    room = 512 - len(chat.prompt(said))
    assert len(chat.send(said, ignore_eos=True).tokens) == min(room, NEW)


def test_refusals(talker, tokenizers) -> None:
    sampler = sampler_of(talker, tokenizers["appending"])
    for how, why in (
        ({"warmth": 1}, "unknown setting warmth"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"system": 3}, "system=3"),
        ({"history": [3]}, "must be a list like"),
    ):
        with pytest.raises(ValueError, match=why):
            Chat(sampler, **how)
    with pytest.raises(ValueError, match=r"put a chat_template.jinja beside"):
        Chat(sampler_of(talker, tokenizers["none"]))
    with pytest.raises(ValueError, match=r"a chat needs an el.Tokenizer"):
        Chat(Sampler(Decoder(talker[0]), talker[1]))
    own = Chat(sampler_of(talker, tokenizers["none"]), chat_template=APPENDING, max_new_tokens=NEW)
    assert own.send(SAID[0]).tokens == Chat(sampler, max_new_tokens=NEW).send(SAID[0]).tokens


def test_a_chat_ends_its_answer_at_the_switch_of_longrope_and_goes_on_above_it(talker, tokenizers) -> None:
    config, params, _ = talker
    tokenizer, pairs = tokenizers["appending"], config.rotary_dim // 2
    first = len(Chat(sampler_of(talker, tokenizer)).prompt(SAID[0]))
    factors = {"short_factors": (1.0,) * pairs, "long_factors": (8.0,) * pairs, "factor": 8.0}
    rope = RopeConfig(scaling="longrope", original_max_len=first + 3, **factors)
    sampler = Sampler(Decoder(dataclasses.replace(config, rope=rope)), params, tokenizer)

    chat = Chat(sampler, max_new_tokens=NEW, ignore_eos=True)
    assert len(chat.send(SAID[0]).tokens) == 4
    prompt = chat.prompt(SAID[1])
    answer = chat.send(SAID[1])
    assert chat.reused == 0
    assert answer.tokens == sampler.sample(prompt, NEW, ignore_eos=True).tokens

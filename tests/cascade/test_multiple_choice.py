"""Multiple choice by likelihood: against a plain forward pass, whatever records are batched with."""

import dataclasses
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from small_models import Letters

import elastic_lm as el
from elastic_lm import testing
from elastic_lm.cascade import known_tokens
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.multiple_choice import MultipleChoice
from elastic_lm.cascade.scores import PLAIN, Scoring
from elastic_lm.cascade.shared_model import shared_members, shared_multiple_choice
from elastic_lm.config.model import RopeConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.cost.sequences import head_flops, layer_flops
from elastic_lm.models.decoder import Decoder
from elastic_lm.width import slicing

CONFIG = testing.tiny_config(exits=(1,), n_layers=2)


@pytest.fixture(scope="module")
def params():
    return testing.random_params(CONFIG, scale=0.2)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    rng, letters = np.random.default_rng(0), "abcdefghij klmno"

    def text(n: int) -> str:
        return "".join(rng.choice(list(letters), n))

    return [
        {"prompt": text(rng.integers(1, 50)), "choices": [text(rng.integers(1, 9)) for _ in range(2 + i % 2)]}
        for i in range(14)
    ]


def by_hand(config, params, record: dict, depth: int, divide: str = "tokens") -> list[float]:
    sums = []
    for choice in record["choices"]:
        start, end = Letters().encode(record["prompt"], bos=True), Letters().encode(" " + choice)
        logits = testing.all_logits(
            config, params, jnp.asarray([[*start, *end] + [0] * (64 - len(start + end))])
        )
        log_p = jax.nn.log_softmax(logits[depth][0])
        nats = sum(float(log_p[len(start) + m - 1, token]) for m, token in enumerate(end))
        sums.append(nats / {"tokens": len(end), "bytes": len(choice), "none": 1}[divide])
    return sums


@pytest.mark.parametrize("divide", ["tokens", "bytes", "none"])
def test_the_likeliest_choice_wins(params, records: list[dict], divide) -> None:
    choice = MultipleChoice(
        Decoder(CONFIG), params, Letters(), normalise=divide, scoring=Scoring(0.5), batch_size=8
    )
    for record, answer in zip(records[:6], choice.answer(records[:6]), strict=True):
        expected = by_hand(CONFIG, params, record, 2, divide)
        assert answer.output == int(np.argmax(expected))
        energy = 0.5 * np.log(np.sum(np.exp(np.asarray(expected) / 0.5)))
        assert answer.scores["energy"] == pytest.approx(energy, rel=1e-4, abs=1e-4)
        p = np.exp(expected) / np.sum(np.exp(expected))
        assert answer.scores["max_prob"] == pytest.approx(p.max(), rel=1e-4)
        lengths = [len(record["prompt"]) + 2 + len(c) for c in record["choices"]]
        cost = sum(layer_flops(CONFIG, n - 1) for n in lengths)
        assert answer.cost == cost + head_flops(CONFIG, sum(len(c) + 1 for c in record["choices"]))


@pytest.mark.long
@pytest.mark.parametrize("exit", [None, 1])
@pytest.mark.parametrize("sliced", [False, True])
def test_longrope_rotates_a_padded_row_by_its_own_length(records: list[dict], exit, sliced) -> None:
    """All rows are padded beyond the original context of 30 tokens, and half of them are shorter."""
    pairs = CONFIG.rotary_dim // 2
    factors = {"short_factors": (1.0,) * pairs, "long_factors": (8.0,) * pairs, "factor": 8.0}
    rope = RopeConfig(scaling="longrope", original_max_len=30, **factors)
    exits = (el.ExitConfig(1, "block", tied=True),)
    config = dataclasses.replace(CONFIG, rope=rope, exits=exits)
    params = testing.random_params(config, scale=0.2)
    subnet = Subnet.uniform(config, mlp=0.5) if sliced else None
    small, small_params = slicing.slice_params(config, params, subnet) if sliced else (config, params)

    sides = set()
    choice = MultipleChoice(Decoder(config), params, Letters(), exit=exit, subnet=subnet, batch_size=8)
    for record, answer in zip(records, choice.answer(records), strict=True):
        sums = []
        for text in record["choices"]:
            start, end = Letters().encode(record["prompt"], bos=True), Letters().encode(" " + text)
            logits = testing.all_logits(small, small_params, jnp.asarray([[*start, *end]]))
            log_p = jax.nn.log_softmax(logits[2 if exit is None else 1][0])
            nats = [float(log_p[len(start) + m - 1, token]) for m, token in enumerate(end)]
            sums.append(sum(nats) / len(nats))
            sides.add(len(start) + len(end) > 30)
        p = np.exp(sums) / np.sum(np.exp(sums))
        assert answer.output == int(np.argmax(sums))
        assert answer.scores["max_prob"] == pytest.approx(p.max(), rel=1e-4)
    assert sides == {False, True}


@pytest.mark.long
def test_what_follows_a_sub_network_goes_on_from_the_exit_before_it(params, records: list[dict]) -> None:
    half = Subnet.uniform(CONFIG, mlp=0.5)
    members = shared_members(Decoder(CONFIG), params, Letters(), (1, half, None), batch_size=8)
    alone = [member.answer(records) for member in members]
    sure = [[answer.scores["max_prob"] for answer in own] for own in alone[:2]]
    first = float(np.median(sure[0]))
    second = float(np.median([b for a, b in zip(*sure, strict=True) if a < first]))
    bars = (first, second)
    cascade = Cascade(members[0], members[2], bars, between=members[1:2], score="max_prob", batch_size=4)
    results = cascade.answer(records)
    assert {result.model for result in results} == {"swift", "middle", "super"}
    for result in results:
        for own, answer in zip(alone, result.answers, strict=False):
            assert answer.output == own[result.index].output
            assert answer.scores["max_prob"] == pytest.approx(own[result.index].scores["max_prob"], rel=1e-4)
        rest = result.answers[1:]
        record = records[result.index]
        lengths = [len(record["prompt"]) + 2 + len(c) for c in record["choices"]]
        layers = [layer_flops(CONFIG, n - 1) / 2 for n in lengths]
        heads = head_flops(CONFIG, sum(len(c) + 1 for c in record["choices"]))
        if len(rest) == 2:
            assert rest[0].cost == alone[1][result.index].cost  # it starts over
            assert rest[1].cost == sum(layers) + heads  # one layer is left


def llama_2_tokenizer() -> el.Tokenizer:
    """Every text begins with a space, which is part of its first token."""
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "ab": 4, "▁ab": 5, "▁▁": 6, "c": 7, "abc": 8}
    merges = [("▁", "▁"), ("a", "b"), ("▁", "ab"), ("ab", "c")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>"))
    steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    return el.Tokenizer(backend)


@pytest.mark.parametrize(
    ("prompt", "choice", "separator", "tokens", "scored"),
    [
        ("ab", "ab", " ", "▁ab ▁ab", 1),  # each alone: ▁ab ▁▁ ab
        ("ab ab", "a", " ", "▁ab ▁ab ▁ a", 2),
        ("ba", "b", "", "▁ b ab", 1),  # the prompt's last token, a, is part of another one here
        ("ab", "", " ", "▁ab ▁", 1),
        ("ab", "ab", "", "▁ab ab", 1),
    ],
)
def test_prompt_and_choice_are_one_text(params, prompt, choice, separator, tokens: str, scored: int) -> None:
    tokenizer = llama_2_tokenizer()
    answerer = MultipleChoice(Decoder(CONFIG), params, tokenizer, separator=separator)
    record = {"prompt": prompt, "choices": [choice]}
    question = answerer._question(record)
    assert [tokenizer.backend.id_to_token(i) for i in question.sequences[0]] == tokens.split()
    assert question.choice_tokens == question.sizes[0] == scored
    ids = question.sequences[0]
    log_p = jax.nn.log_softmax(testing.all_logits(CONFIG, params, jnp.asarray([ids]))[2][0])
    nats = [float(log_p[i - 1, ids[i]]) for i in range(len(ids) - scored, len(ids))]
    assert answerer.answer([record])[0].scores["energy"] == pytest.approx(sum(nats) / scored, rel=1e-4)


def test_a_choice_without_a_token_to_score_fails(params) -> None:
    answerer = MultipleChoice(Decoder(CONFIG), params, llama_2_tokenizer(), separator="")
    answers = answerer.answer([{"prompt": "ab", "choices": ["ab", ""]}, {"prompt": "", "choices": ["ab"]}])
    assert "choices=['ab', '']: every choice needs at least one character" in str(answers[0].error)
    assert "prompt='': needs at least one token" in str(answers[1].error)


def test_a_real_tokenizer_reads_a_choice_as_it_reads_text(params) -> None:
    folder = Path(os.environ.get("ELASTIC_LM_SHARED", "")) / "data" / "weights" / "stories260K"
    if not folder.is_dir():
        pytest.skip("needs ELASTIC_LM_SHARED with a real tokenizer")
    tokenizer, prompt, choice = el.Tokenizer.load(folder), "Once upon a time", "there was a little girl"
    question = MultipleChoice(Decoder(CONFIG), params, tokenizer)._question(
        {"prompt": prompt, "choices": [choice]}
    )
    assert question.sequences == [tokenizer.encode(f"{prompt} {choice}", bos=True)]
    assert tokenizer.decode(question.sequences[0][question.starts[0] :]).strip() == choice


def test_answers_do_not_depend_on_the_batch_and_nothing_is_compiled_per_record(params, records) -> None:
    choice = MultipleChoice(Decoder(CONFIG), params, Letters(), batch_size=8)
    together = choice.answer(records)
    programs = known_tokens.score_tokens._cache_size()
    assert [choice.answer([record])[0] for record in records] == together
    assert choice.answer(records[::-1])[::-1] == together
    assert known_tokens.score_tokens._cache_size() == programs
    assert {choice.bucket(record) for record in records} == {32, 64}


def test_an_exit_is_a_swift_whose_state_the_super_goes_on_from(params, records) -> None:
    swift, super_ = shared_multiple_choice(Decoder(CONFIG), params, Letters(), exit=1, batch_size=8)
    first, alone = swift.answer(records), super_.answer(records)
    for record, answer in zip(records[:4], first, strict=False):
        assert answer.output == int(np.argmax(by_hand(CONFIG, params, record, 1)))
    order = [5, 0, 12, 7, 3]
    resumed = super_.resume([records[i] for i in order], [first[i] for i in order])
    for i, answer in zip(order, resumed, strict=True):
        assert answer.output == alone[i].output
        assert dict(answer.scores) == pytest.approx(dict(alone[i].scores), rel=1e-5, abs=1e-5)
        tokens = [len(records[i]["prompt"]) + 1 + len(c) for c in records[i]["choices"]]
        assert alone[i].cost - answer.cost == sum(layer_flops(CONFIG, n, 0, 1) for n in tokens)
    cut = float(np.median([a.scores["energy"] for a in first]))
    results = Cascade(swift, super_, cut, batch_size=4, super_batch_size=2).answer(records)
    assert {r.model for r in results} == {"swift", "super"}
    assert [r.output for r in results] == [
        (first if a.scores["energy"] >= cut else alone)[i].output for i, a in enumerate(first)
    ]
    assert all(r.cost <= alone[r.index].cost * 1.2 for r in results)  # both heads, layers once


def test_a_sub_network_is_a_swift_that_holds_nothing(params, records) -> None:
    subnet = Subnet.uniform(CONFIG, mlp=0.5, heads=0.5, layers=[1])
    small, cut = slicing.slice_params(CONFIG, params, subnet)
    expected = MultipleChoice(Decoder(small), cut, Letters(), batch_size=8).answer(records)
    del cut
    before, size = held(), sum(x.nbytes for x in jax.tree.leaves(params))
    swift, super_ = shared_multiple_choice(Decoder(CONFIG), params, Letters(), subnet=subnet, batch_size=8)
    answers = swift.answer(records)
    super_.answer(records)
    assert held() - before <= 0.02 * size
    for answer, other in zip(answers, expected, strict=True):
        assert (answer.output, answer.cost) == (other.output, other.cost)
        assert dict(answer.scores) == pytest.approx(dict(other.scores), rel=1e-5, abs=1e-5)


def test_a_sub_network_is_sliced_layer_by_layer() -> None:
    config = testing.tiny_config(n_layers=4, d_model=64, n_heads=4, d_mlp=1024, vocab_size=64)
    params = testing.random_params(config)
    subnet = dataclasses.replace(Subnet.uniform(config, mlp=0.5, heads=0.5), d_model=32)
    slices = [slicing.slice_layer(config, params, subnet, i) for i in range(4)]
    small, cut = slicing.slice_params(config, params, subnet)
    chex.assert_trees_all_equal(slices, [{name: cut[name]} for name in (f"layers_{i}" for i in range(4))])
    layer = sum(x.nbytes for x in jax.tree.leaves(slices[0]))
    head = cut["embed"]["table"].nbytes
    tokens = jnp.ones((1, 32), jnp.int32)
    sizes = []
    for part, weights in (
        (known_tokens.ModelPart(small), cut),
        (known_tokens.ModelPart(config, subnet=subnet), params),
    ):
        lengths = jnp.full((len(tokens), 1), tokens.shape[1])
        program = known_tokens.score_tokens.lower(part, weights, tokens, lengths, scoring=PLAIN).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    own, inside = sizes
    assert inside <= own + 1.2 * layer + head
    assert 1.2 * layer + head < 2 * layer


def held() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


def test_records_that_cannot_be_read_fail_alone(params, records) -> None:
    bad = [
        {"prompt": "x"},
        {"prompt": "x", "choices": "yes"},
        {"prompt": None, "choices": ["a"]},
        {"prompt": "x" * 200, "choices": ["a"]},
    ]
    choice = MultipleChoice(Decoder(CONFIG), params, Letters(), batch_size=8)
    answers = choice.answer([*bad, records[0]])
    assert [a.error is None for a in answers] == [False] * 4 + [True]
    assert "choices" in str(answers[0].error)
    assert "choices='yes': must be a list" in str(answers[1].error)
    assert "max_len=128" in str(answers[3].error)
    assert answers[4] == choice.answer(records[:1])[0]
    assert choice.bucket(bad[0]) is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"exit": 0}, r"exit=0: the model that reads has exits after layers \(1,\)"),
        ({"exit": 2}, "exit=2: the last of 2 layers"),
        ({}, "name an exit or a subnet"),
        ({"exit": 1, "subnet": Subnet.full(CONFIG)}, "one of them"),
        ({"subnet": dataclasses.replace(Subnet.full(CONFIG), d_model=64)}, "subnet.d_model"),
        ({"exit": 1, "normalise": "words"}, "normalise='words'"),
        ({"exit": 1, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_nested_refuses(params, how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared_multiple_choice(Decoder(CONFIG), params, Letters(), **how)

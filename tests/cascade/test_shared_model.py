"""An exit of an encoder as its Swift: the Super goes on from it, and one model lies in memory."""

import jax
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.cascade.answerer import Answer
from elastic_lm.cascade.classifier import Classifier
from elastic_lm.cascade.shared_model import shared_classifier, shared_members
from elastic_lm.cost.sequences import encoder_flops
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.models.registry import init_params
from elastic_lm.models.task_heads import exit_encoder

SIZES = {"vocab_size": 260, "d_model": 16, "n_layers": 3, "n_heads": 2, "d_mlp": 32, "max_len": 64}
CONFIG = el.EncoderConfig(**SIZES, n_labels=2, mlm=True, exits=(1, 2))
HOW = {"text_field": "text", "batch_size": 4}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["some text"], 260)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 8 * x, init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def records() -> list[dict]:
    rng = np.random.default_rng(0)
    return [{"text": "".join(rng.choice(list("abcdefgh "), rng.integers(1, 40)))} for _ in range(11)]


def assert_same(answers: list[Answer], others: list[Answer]) -> None:
    """Equal outputs, and scores but for the rounding of different programs."""
    for one, other in zip(answers, others, strict=True):
        assert one.output == other.output
        np.testing.assert_allclose(list(one.scores.values()), list(other.scores.values()), atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_resumed_records_are_answered_as_from_scratch(params, tokenizer, records, layer: int) -> None:
    model = el.Encoder(CONFIG)
    swift, super_ = shared_classifier(model, params, tokenizer, exit=layer, **HOW)
    small, own = exit_encoder(CONFIG, params, layer)
    alone = Classifier(el.Encoder(small), own, tokenizer, **HOW).answer(records)
    begun, whole = swift.answer(records), super_.answer(records)
    assert_same(begun, alone)
    assert_same(whole, Classifier(model, params, tokenizer, **HOW).answer(records))
    assert len({answer.output for answer in whole}) == 2
    some = [10, 3, 4, 7, 0]
    resumed = super_.resume([records[i] for i in some], [begun[i] for i in some])
    assert_same(resumed, [whole[i] for i in some])
    for i, answer in zip(some, resumed, strict=True):
        tokens = len(tokenizer.encode_pair(records[i]["text"])[0])
        assert answer.cost == encoder_flops(CONFIG, tokens, 3 - layer)
        assert begun[i].cost + answer.cost > whole[i].cost > answer.cost


def test_a_cascade_holds_one_model_and_keeps_order(params, tokenizer, records) -> None:
    swift, super_ = shared_classifier(el.Encoder(CONFIG), params, tokenizer, exit=1, **HOW)
    held = {id(leaf) for part in (swift, super_) for leaf in jax.tree.leaves(part._params)}
    other_exit = {id(leaf) for leaf in jax.tree.leaves(params["exit_2"])}
    assert held == {id(leaf) for leaf in jax.tree.leaves(params)} - other_exit
    begun, whole = swift.answer(records), super_.answer(records)
    threshold = float(np.median([answer.scores["margin"] for answer in begun]))
    cascade = el.Cascade(swift, super_, threshold, score="margin", batch_size=4)
    results = cascade.answer(records)
    assert [result.index for result in results] == list(range(len(records)))
    assert {result.model for result in results} == {"swift", "super"}
    for result, small, large in zip(results, begun, whole, strict=True):
        assert result.answer.output == (small if result.model == "swift" else large).output


def test_exits_that_are_not_there_are_refused(params, tokenizer) -> None:
    with pytest.raises(ValueError, match=r"exit=3: the model has exits after layers \(1, 2\)"):
        shared_classifier(el.Encoder(CONFIG), params, tokenizer, exit=3)


def test_a_chain_of_exits_pays_for_every_layer_once(params, tokenizer, records) -> None:
    parts = (1, 2, None)
    members = shared_members(el.Encoder(CONFIG), params, tokenizer, parts, **HOW)
    begun = [member.answer(records) for member in members]
    medians = [float(np.median([answer.scores["margin"] for answer in own])) for own in begun[:2]]
    cascade = el.Cascade(members[0], members[2], medians, between=members[1:2], score="margin", batch_size=4)
    results = cascade.answer(records)
    assert {result.model for result in results} == {"swift", "middle", "super"}
    for result, alone in zip(results, zip(*begun, strict=True), strict=True):
        number = len(result.answers) - 1
        assert_same(list(result.answers), list(alone[: number + 1]))
        tokens = len(tokenizer.encode_pair(records[result.index]["text"])[0])
        # One layer for each member that was asked, beside the heads that only the first pays with its layer.
        assert [answer.cost for answer in result.answers] == [
            encoder_flops(CONFIG, tokens, 1) for _ in result.answers
        ]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "parts=.*: name at least one"),
        ((2, 1), r"parts=\(2, 1\): name exits in increasing order"),
        ((1, None, 2), r"parts=\(1, None, 2\): name exits in increasing order"),
        ((1, 3), r"exit=3: the model has exits after layers \(1, 2\)"),
    ],
)
def test_parts_in_another_order_are_refused(params, tokenizer, parts: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared_members(el.Encoder(CONFIG), params, tokenizer, parts, **HOW)

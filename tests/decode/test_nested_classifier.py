"""An exit of an encoder as its Swift: the Super goes on from it, and one model lies in memory."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.decode.classifier import Classifier
from elastic_lm.decode.nested import nested_classifier
from elastic_lm.models.encoder import init_params
from elastic_lm.sequence_cost import encoder_flops

CONFIG = el.EncoderConfig(
    vocab_size=260, d_model=16, n_layers=3, n_heads=2, d_mlp=32, max_len=64, n_labels=2, mlm=True
)
LOWEST = dataclasses.replace(CONFIG, n_layers=1)
HOW = {"text_field": "text", "batch_size": 4}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["some text"], 260)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 8 * x, init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def exit_params(params):
    """Copies of the lowest layers, as a file would give them, with a head of their own."""
    lowest = {name: tree for name, tree in params.items() if name not in ("layers_1", "layers_2")}
    head = jax.tree.map(lambda x: 8 * x, init_params(LOWEST, jax.random.key(1)))
    return {**jax.tree.map(lambda x: x + 0, lowest), "head": head["head"], "pooler": head["pooler"]}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    rng = np.random.default_rng(0)
    return [{"text": "".join(rng.choice(list("abcdefgh "), rng.integers(1, 40)))} for _ in range(11)]


def test_resumed_rows_are_answered_as_from_scratch(params, exit_params, tokenizer, rows) -> None:
    model, small = el.Encoder(CONFIG), el.Encoder(LOWEST)
    swift, super_ = nested_classifier(model, params, (small, exit_params), tokenizer, **HOW)
    alone = Classifier(small, exit_params, tokenizer, **HOW).answer(rows)
    begun, whole = swift.answer(rows), super_.answer(rows)
    assert begun == alone
    assert len({answer.output for answer in whole}) == 2
    some = [10, 3, 4, 7, 0]
    resumed = super_.resume([rows[i] for i in some], [begun[i] for i in some])
    for i, answer in zip(some, resumed, strict=True):
        assert answer.output == whole[i].output
        np.testing.assert_allclose(list(answer.scores.values()), list(whole[i].scores.values()), atol=1e-5)
        tokens = len(tokenizer.encode_pair(rows[i]["text"])[0])
        assert answer.cost == encoder_flops(CONFIG, tokens, 2)
        assert begun[i].cost + answer.cost > whole[i].cost > answer.cost


def test_a_cascade_holds_one_model_and_keeps_order(params, exit_params, tokenizer, rows) -> None:
    exit_ = (el.Encoder(LOWEST), exit_params)
    swift, super_ = nested_classifier(el.Encoder(CONFIG), params, exit_, tokenizer, **HOW)
    held = {id(leaf) for part in (swift, super_) for leaf in jax.tree.leaves(part._params)}
    own = {id(leaf) for leaf in jax.tree.leaves(params)}
    heads = {id(leaf) for name in ("head", "pooler") for leaf in jax.tree.leaves(exit_params[name])}
    assert held == own | heads
    begun, whole = swift.answer(rows), super_.answer(rows)
    threshold = float(np.median([answer.scores["margin"] for answer in begun]))
    cascade = el.Cascade(swift, super_, threshold, score="margin", batch_size=4)
    results = cascade.answer(rows)
    assert [result.index for result in results] == list(range(len(rows)))
    assert {result.model for result in results} == {"swift", "super"}
    for result, small, large in zip(results, begun, whole, strict=True):
        assert result.answer.output == (small if result.model == "swift" else large).output


def test_other_layers_are_refused(params, exit_params, tokenizer) -> None:
    model, small = el.Encoder(CONFIG), el.Encoder(LOWEST)
    chex.assert_trees_all_equal(exit_params["layers_0"], params["layers_0"])
    moved = {**exit_params, "layers_0": jax.tree.map(lambda x: x + 1, exit_params["layers_0"])}
    with pytest.raises(ValueError, match="exit='layers_0': differs from the model's: train the exit on it"):
        nested_classifier(model, params, (small, moved), tokenizer)
    with pytest.raises(ValueError, match=r"exit\.n_layers=3: must leave some of the 3 layers"):
        nested_classifier(model, params, (model, params), tokenizer)

"""An encoder as a model of a cascade: against the model itself, whatever records are batched with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import drawn

import elastic_lm as el
from elastic_lm.cascade import classifier
from elastic_lm.cascade.classifier import Classifier
from elastic_lm.cascade.scores import Scoring
from elastic_lm.cost.sequences import encoder_flops
from elastic_lm.data.tokenizer import Tokenizer, train_bpe

CONFIG = el.EncoderConfig(
    vocab_size=260,
    d_model=16,
    n_layers=2,
    n_heads=2,
    d_mlp=32,
    max_len=64,
    n_labels=3,
    labels=("a", "b", "c"),
)


@pytest.fixture(scope="module")
def params():
    params = drawn(CONFIG, 0.5)
    return {**params, "head": {**params["head"], "bias": jnp.asarray([-1.0, -0.41, 0.0])}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["some text"], 260)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    rng = np.random.default_rng(0)

    def text(most: int) -> str:
        return "".join(rng.choice(list("abcdefgh "), rng.integers(1, most)))

    return [{"a": text(40), "b": text(12)} for _ in range(11)]


def test_labels_scores_and_costs(params, tokenizer, records) -> None:
    model = el.Encoder(CONFIG)
    forward = jax.jit(lambda *args: model.apply({"params": params}, *args).logits[0])
    fields = {"text_field": "a", "pair_field": "b", "batch_size": 4}
    answerer = Classifier(model, params, tokenizer, scoring=Scoring(2.0, "mean"), **fields)
    answers = answerer.answer(records)
    assert len({answer.output for answer in answers}) > 1
    for record, answer in zip(records[:5], answers, strict=False):
        ids, types = tokenizer.encode_pair(record["a"], record["b"])
        padding = [0] * (64 - len(ids))
        mask = jnp.asarray([[1] * len(ids) + padding])
        tokens, kinds = jnp.asarray([ids + padding]), jnp.asarray([types + padding])
        logits = np.asarray(forward(tokens, mask, kinds))
        assert answer.output == logits.argmax()
        energy = 2 * np.log(np.exp((logits - logits.mean()) / 2).sum())
        assert answer.scores["energy"] == pytest.approx(energy, rel=1e-5)
        assert answer.cost == encoder_flops(CONFIG, len(ids))
    programs = classifier.classify._cache_size()
    assert [answerer.answer([record])[0] for record in records] == answers
    assert answerer.answer(records[::-1])[::-1] == answers
    assert classifier.classify._cache_size() == programs
    assert {answerer.bucket(record) for record in records} == {32, 64}
    assert answerer.names == ("a", "b", "c")


def test_records_are_cut_or_fail_alone(params, tokenizer, records) -> None:
    answerer = Classifier(el.Encoder(CONFIG), params, tokenizer, text_field="a", max_len=8, batch_size=4)
    answers = answerer.answer([{"a": "x" * 500}, {"b": "x"}, {"a": None}, records[0]])
    assert [answer.error is None for answer in answers] == [True, False, False, True]
    assert answers[0].cost == encoder_flops(CONFIG, 8)


def test_a_regression_gives_its_value(tokenizer) -> None:
    config = el.EncoderConfig(
        vocab_size=260, d_model=16, n_layers=1, n_heads=2, d_mlp=32, n_labels=1, problem="regression"
    )
    params = drawn(config)
    (answer,) = Classifier(el.Encoder(config), params, tokenizer).answer([{"text": "hello"}])
    ids, _ = tokenizer.encode_pair("hello")
    value = jax.jit(el.Encoder(config).apply)({"params": params}, jnp.asarray([ids])).logits[0, 0]
    assert answer.output == pytest.approx(float(value), abs=1e-5)
    assert answer.scores == {}


def test_flops_are_those_of_the_products() -> None:
    d, t = 16, 10
    projections, attention, mlp = 4 * d * d * t, 2 * t * t * d, 2 * d * 32 * t
    assert encoder_flops(CONFIG, t) == 2 * (2 * (projections + attention + mlp) + d * d + d * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_labels": 0, "labels": ()}, "no task head"), ({}, "max_len=65")],
)
def test_refusals(params, tokenizer, change: dict, message: str) -> None:
    model = el.Encoder(dataclasses.replace(CONFIG, **change))
    with pytest.raises(ValueError, match=message):
        Classifier(model, params, tokenizer, max_len=65)

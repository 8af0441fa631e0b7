"""Training on pairs: the loss by hand, distillation, initialisation, and a copy task learned by heart."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.task import TaskConfig
from elastic_lm.data.pairs import train_pairs
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.decode.seq2seq import TextToText
from elastic_lm.models.encoder_decoder import EncoderDecoder, attach_encoder_head
from elastic_lm.models.registry import init_params
from elastic_lm.train.method import TEACHER
from elastic_lm.train.tasks.seq2seq import PairBatch, SequenceToSequence

CONFIG = EncoderDecoderConfig(300, 32, 2, 4, 64, eos_ids=(0,), pad_id=0)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def batch() -> PairBatch:
    rng = np.random.default_rng(0)
    weights = np.ones((3, 10), np.float32)
    weights[1, 4:] = 0
    return PairBatch(
        jnp.asarray(rng.integers(0, 300, (3, 8))),
        jnp.asarray(np.arange(8) < np.asarray([[8], [5], [2]])),
        jnp.asarray(rng.integers(0, 300, (3, 10))),
        jnp.asarray(rng.integers(0, 300, (3, 10))),
        jnp.asarray(weights),
    )


def loss(method: SequenceToSequence, params, batch: PairBatch):
    return jax.jit(method.loss)(*method.split(params), batch, jnp.int32(0))


def logits_of(config: EncoderDecoderConfig, params, batch: PairBatch) -> np.ndarray:
    model = EncoderDecoder(config)
    inputs = batch.source, batch.target_in, batch.source_mask
    return np.asarray(jax.jit(model.apply)({"params": params}, *inputs), np.float64)


def test_the_loss_is_that_of_the_logits(params, batch) -> None:
    other = dataclasses.replace(CONFIG, n_layers=1)
    taught = init_params(other, jax.random.key(1))
    method = SequenceToSequence(CONFIG, other, distil=0.3, temperature=2.0, z_loss=0.01, loss_chunk=4)
    total, metrics = loss(method, {**params, TEACHER: taught}, batch)
    z, t = logits_of(CONFIG, params, batch), logits_of(other, taught, batch)
    weights = np.asarray(batch.weights)
    normaliser = np.log(np.exp(z).sum(-1))
    entropy = normaliser - np.take_along_axis(z, np.asarray(batch.target)[..., None], -1)[..., 0]
    log_q, log_p = (x / 2 - np.log(np.exp(x / 2).sum(-1, keepdims=True)) for x in (z, t))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    expected = {
        "loss": 0.7 * entropy + 0.3 * 4 * divergence + 0.01 * normaliser**2,
        "cross_entropy": entropy,
        "divergence": divergence,
        "accuracy": z.argmax(-1) == np.asarray(batch.target),
    }
    assert total == metrics["loss"]
    for name, values in expected.items():
        mean = (values * weights).sum() / weights.sum()
        assert float(metrics[name]) == pytest.approx(mean, rel=1e-4), name


def test_nothing_is_left_to_learn_from_oneself(params, batch) -> None:
    method = SequenceToSequence(CONFIG, CONFIG, distil=1.0)
    trainable, frozen = method.split({**params, TEACHER: params})
    gradients, metrics = jax.jit(jax.grad(method.loss, has_aux=True))(trainable, frozen, batch, jnp.int32(0))
    assert float(metrics["divergence"]) == pytest.approx(0, abs=1e-5)
    assert float(optax.tree.norm(gradients)) < 1e-3


def test_a_head_on_the_encoder_stays_as_it_is(params) -> None:
    config, with_head = attach_encoder_head(CONFIG, params, 2, jax.random.key(0))
    trainable, frozen = SequenceToSequence(config).split(with_head)
    assert set(frozen) == {"encoder_head"}
    assert set(trainable) == set(params)


def test_what_does_not_fit_is_refused(params) -> None:
    teacher = dataclasses.replace(CONFIG, vocab_size=299)
    for fields in (
        {"distil": 0.5},
        {"distil": 2.0},
        {"temperature": 0.0},
        {"z_loss": -1.0},
        {"loss_chunk": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            SequenceToSequence(CONFIG, **fields)
    with pytest.raises(ValueError, match=r"distil=0\.0: give a teacher exactly where"):
        SequenceToSequence(CONFIG, CONFIG)
    with pytest.raises(ValueError, match=r"teacher\.vocab_size=299"):
        SequenceToSequence(CONFIG, teacher, distil=0.5)


def test_parameters_begin_as_those_of_t5() -> None:
    config = EncoderDecoderConfig(512, 64, 1, 4, 256, head_dim=16, tied=False, scaled_head=False)
    params = init_params(config, jax.random.key(0))
    layer = params["decoder"]["layers_0"]
    deviations = {
        "embed": (params["embed"]["table"], 1.0),
        "head": (params["head"]["kernel"], 64**-0.5),
        "query": (layer["attn"]["qkv"]["kernel"][:, 0], (64 * 16) ** -0.5),
        "key": (layer["attn"]["qkv"]["kernel"][:, 1], 64**-0.5),
        "cross query": (layer["cross"]["q"]["kernel"], (64 * 16) ** -0.5),
        "cross value": (layer["cross"]["kv"]["kernel"][:, 1], 64**-0.5),
        "down": (layer["mlp"]["down"]["kernel"], 256**-0.5),
        "bias": (layer["relative_bias"]["table"], 64**-0.5),
    }
    for name, (kernel, deviation) in deviations.items():
        assert float(jnp.std(kernel)) == pytest.approx(deviation, rel=0.15), name
    np.testing.assert_array_equal(params["encoder"]["final_norm"]["scale"], 1.0)


@pytest.mark.long
def test_a_copy_task_is_learned_by_heart(tmp_path: Path) -> None:
    words = ["one two", "three", "four five six", "seven", "eight nine"]
    file = tmp_path / "copy.jsonl"
    file.write_text("".join(json.dumps({"source": w, "target": w}) + "\n" for w in words))
    tokenizer = train_bpe(words, 300)
    method = SequenceToSequence(CONFIG, z_loss=1e-4)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, batch):
        gradients, metrics = jax.grad(method.loss, has_aux=True)(params, {}, batch, jnp.int32(0))
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, metrics

    params, _ = method.split(init_params(CONFIG, jax.random.key(0)))
    state = optimizer.init(params)
    fields = {"text_field": "source", "label_field": "target", "max_len": 512, "max_target": 128}
    task = TaskConfig("text_to_text", (str(file),), batch_size=5, **fields)
    data = train_pairs(task, CONFIG, tokenizer)
    for arrays in itertools.islice(iter(data), 150):
        params, state, metrics = step(params, state, PairBatch(**arrays))
    assert float(metrics["loss"]) < 0.1
    results = TextToText(EncoderDecoder(CONFIG), params, tokenizer).generate(words, 16)
    assert [r.text for r in results] == words
    assert all(r.tokens[-1] == 0 for r in results)

"""The loss of task tuning, against what it is by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.models.registry import init_params
from elastic_lm.models.task_heads import exit_encoder
from elastic_lm.train.tasks.config import Tuned
from elastic_lm.train.tasks.tuning import TEACHER, TaskBatch, TaskTuning, distance, task_logits, task_loss

CONFIG = EncoderConfig(vocab_size=40, d_model=16, n_layers=2, n_heads=2, d_mlp=32, max_len=16, n_labels=3)
SMALL = EncoderConfig(vocab_size=40, d_model=8, n_layers=1, n_heads=2, d_mlp=16, max_len=16, n_labels=3)
NUMBER = EncoderConfig(
    vocab_size=40, d_model=8, n_layers=1, n_heads=2, d_mlp=16, max_len=16, n_labels=1, problem="regression"
)


def batch(targets: list[float], weights: list[float]) -> TaskBatch:
    rng, b = np.random.default_rng(0), len(targets)
    tokens = rng.integers(1, 40, (b, 8)).astype(np.int32)
    mask = np.arange(8) < rng.integers(3, 9, (b, 1))
    types = np.zeros((b, 8), np.int32)
    return TaskBatch(tokens, mask, types, np.asarray(targets), np.asarray(weights, np.float32))


def test_cross_entropy_and_distance_by_hand() -> None:
    logits, teacher = jnp.asarray([[2.0, 0.0, -1.0]]), jnp.asarray([[0.0, 1.0, 0.0]])
    p = np.exp([2.0, 0.0, -1.0]) / np.exp([2.0, 0.0, -1.0]).sum()
    np.testing.assert_allclose(task_loss(CONFIG, logits, jnp.asarray([1])), [-np.log(p[1])], rtol=1e-6)
    soft, aim = (np.exp(np.asarray(x[0]) / 2.0) for x in (logits, teacher))
    soft, aim = soft / soft.sum(), aim / aim.sum()
    expected = 4.0 * np.sum(aim * np.log(aim / soft))
    np.testing.assert_allclose(distance(CONFIG, teacher, logits, 2.0), [expected], rtol=1e-5)
    np.testing.assert_allclose(distance(CONFIG, logits, logits + 3.0, 1.0), [0.0], atol=1e-6)
    one = jnp.asarray([[0.5]])
    np.testing.assert_allclose(task_loss(NUMBER, one, jnp.asarray([2.0])), [2.25])
    np.testing.assert_allclose(distance(NUMBER, one + 2.0, one, 1.0), [4.0])


@pytest.mark.parametrize("distil", [0.0, 0.25, 1.0])
def test_the_loss_is_the_weighted_mean_of_its_parts(distil: float) -> None:
    student, teacher = (init_params(c, jax.random.key(i)) for i, c in enumerate((SMALL, CONFIG)))
    data = batch([0, 2, 1], [1.0, 2.0, 0.0])
    with_teacher = {"teacher": CONFIG, "distil": distil} if distil else {}
    method = TaskTuning(SMALL, temperature=3.0, z_loss=0.1, **with_teacher)
    params = {**student, TEACHER: teacher} if distil else student
    trainable, frozen = method.split(params)
    assert (TEACHER in frozen) == bool(distil)
    assert set(trainable) == set(student)
    loss, metrics = method.loss(trainable, frozen, data, jnp.asarray(0))
    own, aim = task_logits(SMALL, student, data), task_logits(CONFIG, teacher, data)
    each = (1 - distil) * task_loss(SMALL, own, data.targets) + distil * distance(SMALL, aim, own, 3.0)
    each += 0.1 * jax.nn.logsumexp(own, axis=-1) ** 2
    np.testing.assert_allclose(loss, (each[0] + 2 * each[1]) / 3, rtol=1e-5)
    right = np.argmax(own, axis=-1) == data.targets
    np.testing.assert_allclose(metrics["accuracy"], (right[0] + 2 * right[1]) / 3, rtol=1e-6)
    gradient = jax.grad(lambda t: method.loss(t, frozen, data, jnp.asarray(0))[0])(trainable)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradient["layers_0"]["mlp"]))


def test_regression_reports_its_error_alone() -> None:
    params = init_params(NUMBER, jax.random.key(0))
    data = batch([0.5, -1.0], [1.0, 1.0])
    loss, metrics = TaskTuning(NUMBER).loss(params, {}, data, jnp.asarray(0))
    expected = np.mean((np.asarray(task_logits(NUMBER, params, data))[:, 0] - [0.5, -1.0]) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert set(metrics) == {"loss"}


@pytest.mark.parametrize("tuned", ["all", "exits"])
def test_exits_add_their_own_losses(tuned: Tuned) -> None:
    config = dataclasses.replace(CONFIG, n_layers=3, exits=(1, 2))
    params, data = init_params(config, jax.random.key(0)), batch([0, 2, 1], [1.0, 2.0, 0.0])
    method = TaskTuning(config, z_loss=0.1, tuned=tuned, exit_weights=(0.5, 2.0))
    trainable, frozen = method.split(params)
    assert set(trainable) == ({"exit_1", "exit_2"} if tuned == "exits" else set(params))
    loss, metrics = method.loss(trainable, frozen, data, jnp.asarray(0))
    parts = {layer: TaskTuning(*exit_encoder(config, params, layer)[:1], z_loss=0.1) for layer in (1, 2)}
    each = [part.loss(exit_encoder(config, params, layer)[1], {}, data, 0) for layer, part in parts.items()]
    expected = 0.5 * each[0][0] + 2.0 * each[1][0]
    if tuned == "all":
        whole = TaskTuning(dataclasses.replace(config, exits=()), z_loss=0.1).loss(params, {}, data, 0)
        expected += whole[0]
        np.testing.assert_allclose(metrics["accuracy"], whole[1]["accuracy"])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for layer, (_, own) in zip(parts, each, strict=True):
        np.testing.assert_allclose(metrics[f"accuracy/exit_{layer}"], own["accuracy"])

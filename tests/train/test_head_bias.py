"""A bias of the vocabulary head in the losses, which never hold all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.ee_tuning import JointTraining
from elastic_lm.depth.self_supervised import SelfSupervisedExits
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.sharding import Rules, make_mesh, param_shardings
from elastic_lm.testing import random_params, random_tokens, tiny_config

CONFIG = tiny_config(n_layers=2, head_bias=True, norm="layernorm", gated=False).with_exits(
    (ExitConfig(1, "norm"), ExitConfig(2, "norm", tied=True))
)


def batch_of(length: int = 9) -> Batch:
    tokens = random_tokens(CONFIG, 2, length + 1)
    ones = jnp.ones((2, length), jnp.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)


@pytest.mark.long
def test_joint_training_has_the_gradient_of_all_biases() -> None:
    batch, params = batch_of(), random_params(CONFIG)
    method = JointTraining(CONFIG, weights=(0.5, 0.25), loss_chunk=4)

    def whole(params: Params) -> jax.Array:
        output = Decoder(CONFIG).apply({"params": params}, batch.tokens)

        def loss(logits: jax.Array) -> jax.Array:
            log_p = jax.nn.log_softmax(logits)
            return -jnp.mean(jnp.take_along_axis(log_p, batch.targets[..., None], -1))

        first, second = map(loss, output.exit_logits)
        return loss(output.logits) + 0.5 * first + 0.25 * second

    found, slopes = jax.value_and_grad(lambda p: method.loss(p, {}, batch, jnp.int32(10**6))[0])(params)
    expected, due = jax.value_and_grad(whole)(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for tree in ("head", "exit_1"):
        for got, wanted in zip(jax.tree.leaves(slopes[tree]), jax.tree.leaves(due[tree]), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert np.abs(due["head"]["bias"]).max() > 1e-3


def test_a_part_of_the_vocabulary_has_its_biases() -> None:
    """What imitation of the likeliest tokens alone reads (`depth.vocabulary_sample`)."""
    params = random_params(CONFIG)
    head = Decoder(CONFIG).bind({"params": params}).exit_head(0)
    features, ids = jnp.asarray(np.random.default_rng(0).normal(size=(5, 32))), jnp.asarray([3, 60, 7])
    np.testing.assert_allclose(head.rows(ids).logits(features), head.logits(features)[:, ids], rtol=1e-5)

    method = SelfSupervisedExits(CONFIG, candidates=32, loss_chunk=4)
    trainable, frozen = method.split(params)
    slopes = jax.grad(lambda t: method.loss(t, frozen, batch_of(), jnp.int32(0))[0])(trainable)
    assert np.count_nonzero(slopes["exit_1"]["head"]["bias"]) in range(16, 33)


def test_biases_lie_where_their_rows_of_the_head_lie() -> None:
    shardings = param_shardings(CONFIG, make_mesh())
    for head in (shardings["head"], shardings["exit_1"]["head"]):
        assert tuple(head["bias"].spec) == (Rules().vocab,)
        assert head["kernel"].spec[0] == Rules().vocab

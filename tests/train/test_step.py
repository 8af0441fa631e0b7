"""One step: accumulation, remat and meshes change nothing but the cost; it compiles once."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Params, stack_layers
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import make_mesh, param_shardings, stacked_shardings
from elastic_lm.testing import tiny_config
from elastic_lm.train.config import TrainConfig
from elastic_lm.train.losses import Metrics
from elastic_lm.train.method import Method
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.pretraining import Pretraining
from elastic_lm.train.state import create_state, state_shardings
from elastic_lm.train.step import make_train_step, place_batch
from elastic_lm.width.elastic_training import ElasticTraining

ROWS, LENGTH, STEPS = 8, 12, 3
# A large eps keeps AdamW from turning rounding of tiny gradients into whole steps.
TRAIN = TrainConfig(steps=10, lr=1e-2, warmup=0, schedule="constant", eps=1e-3)


def host_batch(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Random tokens; rows count 1 .. LENGTH targets, so parts of a batch weigh differently."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (ROWS, LENGTH + 1), dtype=np.int32)
    counted = 1 + np.arange(ROWS)[:, None] * LENGTH // ROWS
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (np.arange(LENGTH)[None] < counted).astype(np.float32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segments": np.ones((ROWS, LENGTH), np.int32),
    }


def train(method: Method, config: ModelConfig, mesh: Mesh | None = None, accumulate: int = 1) -> Any:
    """Three steps from the same start; returns final parameters and the last metrics."""
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    shardings = stacked_shardings(param_shardings(config, mesh))
    params = jax.device_put(stack_layers(init_params(config, jax.random.key(0))), shardings)
    trainable, frozen = method.split(params)
    optimizer = make_optimizer(TRAIN)
    state = create_state(optimizer, trainable)
    step = make_train_step(method, optimizer, state_shardings(optimizer, trainable), accumulate)
    metrics = {}
    for i in range(STEPS):
        state, metrics = step(state, frozen, place_batch(host_batch(config, i), mesh))
    assert int(state.step) == STEPS
    return jax.device_get(state.params), jax.device_get(metrics)


CONFIG = tiny_config(n_layers=2)
PLAIN = Pretraining(CONFIG)


@pytest.fixture(scope="module")
def reference() -> Any:
    return train(PLAIN, CONFIG)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_equals_the_whole_batch(reference: Any, accumulate: int) -> None:
    found = train(PLAIN, CONFIG, accumulate=accumulate)
    chex.assert_trees_all_close(found, reference, rtol=1e-4, atol=1e-5)


def test_remat_equals_no_remat(reference: Any) -> None:
    found = train(Pretraining(CONFIG, remat=True), CONFIG)
    chex.assert_trees_all_close(found, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(2, 2, 2)])
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_any_mesh_equals_one_device(reference: Any, sizes: tuple[int, int, int]) -> None:
    found = train(PLAIN, CONFIG, make_mesh(*sizes))
    chex.assert_trees_all_close(found, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_accumulation_on_a_mesh_equals_one_device(reference: Any) -> None:
    found = train(PLAIN, CONFIG, make_mesh(2, 2, 2), accumulate=2)
    chex.assert_trees_all_close(found, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_elastic_training_on_a_mesh_equals_one_device() -> None:
    """Loss, norm of the gradient and parameters, over draws that cut what the devices share."""
    config = tiny_config(n_layers=1, n_heads=8, head_dim=4, elastic_groups=8)
    method = ElasticTraining(config, menu=Menu((0.25, 1.0), (1.0,), (0.5, 1.0)), distil=0.5)
    drawn = jax.vmap(method.subnets)(jnp.arange(STEPS))
    for index in (drawn.mlp, drawn.groups):
        assert set(np.asarray(index).ravel().tolist()) == {0, 1}
    expected, found = train(method, config), train(method, config, make_mesh(2, 2, 2))
    assert {"loss", "loss/sampled", "kl/sampled", "grad_norm"} <= set(expected[1])
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_step_compiles_once() -> None:
    traces = []

    class Counted(Pretraining):
        def loss(
            self, trainable: Params, frozen: Params, batch: Batch, step: jax.Array
        ) -> tuple[jax.Array, Metrics]:
            traces.append(1)
            return super().loss(trainable, frozen, batch, step)

    train(Counted(CONFIG), CONFIG)
    assert len(traces) == 1


def test_moments_are_sharded_like_their_parameters() -> None:
    mesh = make_mesh()
    params = {"layers": {"kernel": jax.device_put(jnp.ones((8, 4)))}}
    sharding = jax.sharding.NamedSharding(mesh, jax.P(("data",)))
    params = jax.device_put(params, sharding)
    state = create_state(make_optimizer(TRAIN), params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (8, 4)]
    assert len(moments) == 2
    assert all(leaf.sharding == sharding for leaf in moments)

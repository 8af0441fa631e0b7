"""Schedules, clipping, which parameters decay, and where moments live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from elastic_lm.models.sharding import make_mesh, replicated
from elastic_lm.train.config import TrainConfig
from elastic_lm.train.optim import decayed, learning_rate, make_optimizer
from elastic_lm.train.state import state_shardings


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedule_rises_to_the_peak_and_ends_at_the_floor(schedule) -> None:
    config = TrainConfig(steps=100, lr=1e-2, warmup=10, schedule=schedule, min_lr=0.1)
    rate = learning_rate(config)
    assert rate(0) == 0
    np.testing.assert_allclose(rate(5), 5e-3, rtol=1e-6)
    np.testing.assert_allclose(rate(10), 1e-2, rtol=1e-6)
    np.testing.assert_allclose(rate(100), 1e-2 if schedule == "constant" else 1e-3, rtol=1e-5)


def test_wsd_is_flat_until_its_decay() -> None:
    rate = learning_rate(TrainConfig(steps=100, lr=1.0, warmup=10, schedule="wsd", decay_share=0.25))
    np.testing.assert_allclose([rate(s) for s in (10, 40, 75)], 1.0, rtol=1e-6)
    assert rate(80) < 1.0


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    rate = learning_rate(TrainConfig(steps=100, lr=1.0, warmup=0))
    assert rate(0) == 1.0


def test_clipping_bounds_the_global_norm() -> None:
    """With b1 = b2 = 0 and a large eps, AdamW's step is lr * gradient / eps."""
    config = TrainConfig(
        steps=10, lr=1.0, warmup=0, schedule="constant", b1=0.0, b2=0.0, eps=1e3, weight_decay=0.0, clip=0.5
    )
    params = {"a": {"kernel": jnp.zeros(3)}, "b": {"scale": jnp.zeros(4)}}
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, 10.0), params)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    step = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(updates)])
    np.testing.assert_allclose(np.linalg.norm(step) * 1e3, 0.5, rtol=1e-3)


def test_only_kernels_and_tables_decay() -> None:
    params = {
        "embed": {"table": 0},
        "layers": {"attn": {"qkv": {"kernel": 0, "bias": 0}}, "attn_norm": {"scale": 0}},
    }
    assert decayed(params) == {
        "embed": {"table": True},
        "layers": {"attn": {"qkv": {"kernel": True, "bias": False}}, "attn_norm": {"scale": False}},
    }


def test_muon_orthogonalises_kernels_of_layers_only() -> None:
    key = jax.random.key(0)
    shapes = {
        "embed": {"table": (16, 8)},
        "head": {"kernel": (16, 8)},
        "layers": {"mlp": {"up": {"kernel": (2, 12, 8)}}, "norm": {"scale": (2, 8)}},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jax.random.normal(key, s), shapes, is_leaf=is_shape)
    config = TrainConfig(optimizer="muon", lr=1.0, schedule="constant", warmup=0, weight_decay=0.0, clip=0.0)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    up = np.asarray(updates["layers"]["mlp"]["up"]["kernel"])
    for update in up:
        singular = np.linalg.svd(update, compute_uv=False) / (0.2 * 12**0.5)
        assert singular.min() > 0.6
        assert singular.max() < 1.3
    layers = updates["layers"]["norm"]["scale"]
    for update in (updates["embed"]["table"], updates["head"]["kernel"], layers):  # Adam's first step: signs
        np.testing.assert_allclose(np.abs(update), np.abs(layers).max(), rtol=1e-3)


def test_moments_are_placed_like_their_parameters() -> None:
    mesh = make_mesh(-1, 1, 1)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = {
        "up": {"kernel": jax.device_put(jnp.ones((8, 4)), rows)},
        "norm": {"scale": jax.device_put(jnp.ones(4), replicated(mesh))},
    }
    for name in ("adamw", "muon"):
        places = state_shardings(make_optimizer(TrainConfig(optimizer=name)), params).opt_state
        kernels = [s for p, s in jax.tree_util.tree_leaves_with_path(places) if "kernel" in str(p)]
        assert kernels
        assert all(s == rows for s in kernels)
        others = [s for p, s in jax.tree_util.tree_leaves_with_path(places) if "kernel" not in str(p)]
        assert others
        assert all(s == replicated(mesh) for s in others)

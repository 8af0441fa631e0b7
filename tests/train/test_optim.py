"""Schedules, clipping and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config import TrainConfig
from elastic_lm.train.optim import decayed, learning_rate, make_optimizer


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

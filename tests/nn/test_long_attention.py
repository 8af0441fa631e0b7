"""Attention of long texts holds the logits of a few queries at a time, and computes what it does at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.nn import attention
from elastic_lm.nn.attention import HIDDEN_POSITION, AttentionContext, KeyValues, alibi_of, attend
from elastic_lm.testing import tiny_config

LENGTH = 70  # no multiple of a chunk of 16


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONG", 10**9)


def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONG", 16)
    monkeypatch.setattr(attention, "CHUNK", 16)


def queries_and_keys(batch: int, t: int, s: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (batch, t, 6, 8), (batch, 2, s, 8), (batch, 2, s, 8)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v


def contexts(case: str) -> tuple[AttentionContext, jax.Array, jax.Array | None]:
    """A context of two rows, and positions and documents of the new keys."""
    positions = jnp.tile(jnp.arange(LENGTH), (2, 1))
    if case == "window":
        return AttentionContext(positions, window=9), positions, None
    if case == "traced window":
        return AttentionContext(positions, window=jnp.int32(9)), positions, None
    if case == "documents":
        segments = positions // 23
        return AttentionContext(positions, segments=segments), positions, segments
    if case == "padding":
        keys = jnp.where(positions < jnp.array([[50], [LENGTH]]), positions, HIDDEN_POSITION)
        return AttentionContext(positions), keys, None
    if case == "past":
        _, k, v = queries_and_keys(2, 1, 20)
        past = KeyValues(jnp.asarray(k), jnp.asarray(v), jnp.tile(jnp.arange(20), (2, 1)))
        return AttentionContext(positions + 20, past=past), positions + 20, None
    return AttentionContext(positions), positions, None


CASES = ("causal", "window", "traced window", "documents", "padding", "past", "softcap", "slopes")


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_all_logits_at_once(case, monkeypatch):
    context, positions, segments = contexts(case)
    q, k, v = queries_and_keys(2, LENGTH, LENGTH)
    how = {"softcap": 3.0} if case == "softcap" else {}
    config = tiny_config(n_heads=6, n_kv_heads=2, head_dim=8, position="alibi", alibi_rounded=True)
    how |= {"alibi": alibi_of(config)} if case == "slopes" else {}
    target = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def loss(q, k, v):
        out = attend(q, KeyValues(k, v, positions, segments), context, scale=0.3, **how)
        return jnp.sum(out * target), out

    def run():
        # A function of its own per setting, which jit would otherwise find in its cache.
        return jax.jit(jax.value_and_grad(lambda *x: loss(*x), argnums=(0, 1, 2), has_aux=True))(q, k, v)

    whole(monkeypatch)
    (_, expected), gradients = run()
    chunked(monkeypatch)
    (_, found), found_gradients = run()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def temporaries(t: int, *, gradient: bool) -> int:
    """Bytes of temporaries of one row of T tokens with 32 heads, compiled and not run."""

    def run(q, k, v, positions):
        out = attend(q, KeyValues(k, v, positions), AttentionContext(positions), scale=0.1)
        return jnp.sum(out) if gradient else out

    run = jax.grad(run, argnums=(0, 1, 2)) if gradient else run
    heads = jax.ShapeDtypeStruct((1, t, 32, 64), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, 32, t, 64), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, t), jnp.int32)
    memory = jax.jit(run).lower(heads, keys, keys, positions).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
def test_temporaries_grow_with_the_length_and_not_with_its_square(gradient):
    measure = functools.partial(temporaries, gradient=gradient)
    half, full = measure(4096), measure(8192)
    assert full < 2.1 * half
    all_logits = 32 * 8192**2 * 4
    assert full < all_logits / 6

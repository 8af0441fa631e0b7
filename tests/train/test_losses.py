"""Losses in pieces: values and gradients are those of the whole, with every product computed once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.train.losses import losses_over_chunks

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
ROWS, LENGTH, WIDTH, VOCAB = 2, 10, 4, 6


def squares(learned: Any, given: Any) -> tuple[jax.Array, jax.Array]:
    """Weighted squares of scores, and each of them."""
    (kernel, x), (scale, weights) = learned, given
    each = jnp.sum((x @ kernel) ** 2, axis=-1) * scale
    return jnp.sum(each * weights), each


@pytest.mark.parametrize("chunk", [1, 4, 5, 99])
def test_pieces_sum_to_the_whole(chunk: int) -> None:
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.normal(size=(WIDTH, VOCAB)), jnp.float32)
    x = jnp.asarray(random.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    weights = jnp.asarray(random.integers(0, 2, (ROWS, LENGTH)), jnp.float32)
    given = (jnp.float32(0.5), weights)

    def in_pieces(learned: Any) -> Any:
        loss, each = losses_over_chunks(squares, learned, given, chunk)
        return 3.0 * loss, each

    def at_once(learned: Any) -> Any:
        loss, each = squares(learned, given)
        return 3.0 * loss, each

    found, expected = (jit(jax.value_and_grad(f, has_aux=True))((kernel, x)) for f in (in_pieces, at_once))
    jax.tree.map(CLOSE, found, expected)
    jax.tree.map(CLOSE, jit(in_pieces)((kernel, x)), expected[0])

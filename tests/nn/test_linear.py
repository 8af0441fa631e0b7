"""Every form of the linear map computes the same product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.nn.linear import CACHED_BYTES, FEW_TOKENS, LEAST, ONE_BY_ONE, ONE_CORE, PADDED, linear

EDGES = [0, 1, 2, ONE_BY_ONE, LEAST, LEAST + 1, PADDED, PADDED + 1, FEW_TOKENS, FEW_TOKENS + 1]
SHAPES = [*((tokens,) for tokens in EDGES), (1, 1), (3, 2, 5)]
LARGE = CACHED_BYTES // (4 * 7) + 1  # outputs of 7 inputs that no cache is expected to hold


@pytest.mark.parametrize("outputs", [(6,), (2, 3, 4), (LARGE,)])
@pytest.mark.parametrize("batch", SHAPES)
def test_equals_numpy(batch, outputs):
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((*batch, 7), (*outputs, 7), outputs))
    expected = np.tensordot(x, kernel, ((-1,), (-1,))) + bias
    y = jax.jit(linear)(x, kernel, bias)
    assert y.shape == (*batch, *outputs)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, LEAST + 1, FEW_TOKENS, FEW_TOKENS + 1])
def test_bfloat16_products_can_be_kept_in_float32(tokens):
    x, kernel = jnp.ones((tokens, 512), jnp.bfloat16), jnp.full((3, 512), 1.0078125)
    y = linear(x, kernel, dtype=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, np.full((tokens, 3), 516.0))
    assert linear(x, kernel).dtype == jnp.bfloat16


@pytest.mark.parametrize("tokens", [ONE_BY_ONE, LEAST + 1, FEW_TOKENS])
def test_gradients_are_those_of_a_product(tokens):
    x, kernel = (
        jax.random.normal(jax.random.key(0), (tokens, 5)),
        jax.random.normal(jax.random.key(1), (3, 5)),
    )
    of_x, of_kernel = jax.grad(lambda x, k: jnp.sum(linear(x, k) ** 2), argnums=(0, 1))(x, kernel)
    np.testing.assert_allclose(of_kernel, 2 * (x @ kernel.T).T @ x, rtol=1e-4)
    np.testing.assert_allclose(of_x, 2 * x @ kernel.T @ kernel, rtol=1e-4)


@pytest.mark.parametrize("tokens", [ONE_BY_ONE, LEAST + 1])
def test_maps_over_a_further_dimension(tokens):
    x, kernel = (
        jax.random.normal(jax.random.key(0), (2, tokens, 5)),
        jax.random.normal(jax.random.key(1), (2, 3, 5)),
    )
    found = jax.vmap(linear)(x, kernel)
    np.testing.assert_allclose(found, jnp.einsum("nti,noi->nto", x, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [(576,), (575,), (2, 288)])
def test_a_product_in_halves_is_that_of_the_whole_kernel(outputs):
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s).astype(np.float32) for s in ((1, 576), (*outputs, 576)))
    assert CACHED_BYTES < kernel.nbytes < 4 * ONE_CORE
    np.testing.assert_allclose(
        jax.jit(linear)(x, kernel), np.tensordot(x, kernel, ((-1,), (-1,))), rtol=0, atol=1e-4
    )

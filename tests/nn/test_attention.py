"""A token that is decoded attends like one of a whole text, however its products are written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.nn.attention import FEW_QUERIES, AttentionContext, KeyValues, attend


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("group", "new"), [(1, 1), (3, 1), (FEW_QUERIES + 1, 1), (1, 3), (2, 4), (3, 3)])
def test_new_tokens_see_the_past_and_each_other(batch, group, new):
    rng = np.random.default_rng(0)
    groups, capacity, length, h = 2, 8, 5, 4

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q = normal(batch, new, groups * group, h)
    k, v, k_new, v_new = (normal(batch, groups, s, h) for s in (capacity, capacity, new, new))
    index = np.arange(capacity)
    positions = jnp.asarray(np.where(index < length, index, np.iinfo(np.int32).max))[None].repeat(batch, 0)
    here = length + jnp.arange(new)[None].repeat(batch, 0)
    context = AttentionContext(here, past=KeyValues(k, v, positions))
    found = jax.jit(lambda q, new: attend(q, new, context, scale=0.5))(q, KeyValues(k_new, v_new, here))

    keys = np.concatenate([k[:, :, :length], k_new], axis=2).repeat(group, axis=1)
    values = np.concatenate([v[:, :, :length], v_new], axis=2).repeat(group, axis=1)
    for t in range(new):
        seen = length + t + 1
        weights = np.exp(0.5 * np.einsum("bnh,bnsh->bns", q[:, t], keys[:, :, :seen]))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bns,bnsh->bnh", weights, values[:, :, :seen])
        np.testing.assert_allclose(found[:, t], expected, rtol=0, atol=1e-5)

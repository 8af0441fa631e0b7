"""Activations on a mesh: what is stated of them, and that one device's program stays what it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from elastic_lm.models.decoder import Decoder
from elastic_lm.nn.placement import by_rows, on_mesh, traced_on, whole_width
from elastic_lm.testing import random_params, random_tokens, tiny_config

AXES = ("data", "fsdp", "tensor")


def mesh_of(*sizes: int) -> Mesh:
    devices = np.asarray(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def test_one_device_has_the_program_that_it_had() -> None:
    config = tiny_config()
    params, tokens = random_params(config), random_tokens(config, batch=2, length=8)

    def logits(params: object) -> jax.Array:
        return Decoder(config).apply({"params": params}, tokens).logits

    plain = str(jax.make_jaxpr(logits)(params))
    assert str(jax.make_jaxpr(traced_on(logits, mesh_of(1, 1, 1)))(params)) == plain
    assert str(jax.make_jaxpr(traced_on(logits, None))(params)) == plain


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_a_mesh_divides_rows_and_gives_a_table_back_in_slices() -> None:
    mesh = mesh_of(2, 2, 2)
    x, table = jnp.ones((8, 3, 16)), jnp.arange(32.0 * 16).reshape(32, 16)
    tokens = jnp.arange(8 * 3).reshape(8, 3) % 32

    def loss(table: jax.Array) -> jax.Array:
        return jnp.sum(by_rows(whole_width(table)[tokens]) ** 2)

    with on_mesh(mesh):
        placed = jax.jit(by_rows)(x)
        slope = jax.jit(jax.grad(loss))(table)
    assert placed.sharding.spec[0] == ("data", "fsdp")
    assert placed.addressable_shards[0].data.shape[0] == 2
    assert slope.addressable_shards[0].data.shape[1] == 8
    np.testing.assert_array_equal(np.asarray(slope), np.asarray(jax.grad(loss)(table)))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_rows_that_a_mesh_cannot_divide_stay_where_they_are() -> None:
    with on_mesh(mesh_of(2, 2, 2)):
        assert jax.jit(by_rows)(jnp.ones((3, 2, 4))).shape == (3, 2, 4)

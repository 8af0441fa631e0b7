"""FLOPs of traced functions against counts by hand and against XLA's own."""

import jax
import jax.numpy as jnp
import pytest

from elastic_lm.cost.counted import Workload, model_cost
from elastic_lm.cost.device_kinds import KINDS, chip_of
from elastic_lm.cost.topologies import CHIPS
from elastic_lm.cost.traced import traced_flops
from elastic_lm.models.decoder import Decoder, stack_layers
from elastic_lm.testing import random_params, tiny_config

X, W = jnp.ones((4, 8)), jnp.ones((3, 8, 8))
ONE = 2 * 4 * 8 * 8  # of x @ w


def flops(function, *args) -> float | None:
    return traced_flops(jax.jit(function).trace(*args).jaxpr)


def stacked(layer):
    return lambda x, w: jax.lax.scan(lambda h, w: (layer(h, w), None), x, w)[0]


def layer(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w) @ w.T


def test_a_scan_counts_every_layer_and_a_gradient_three_times_the_value() -> None:
    assert flops(stacked(layer), X, W) == 3 * 2 * ONE
    loss = lambda x, w: jnp.sum(stacked(layer)(x, w) ** 2)  # noqa: E731
    assert flops(jax.grad(loss, (0, 1)), X, W) == 3 * 3 * 2 * ONE
    assert (
        flops(jax.grad(loss, 1), X, W) == 3 * 3 * 2 * ONE
    )  # the lower layers' gradient goes through the upper


def test_what_is_computed_again_does_not_count() -> None:
    plain = lambda x, w: jnp.sum(stacked(layer)(x, w) ** 2)  # noqa: E731
    again = lambda x, w: jnp.sum(stacked(jax.checkpoint(layer))(x, w) ** 2)  # noqa: E731
    assert flops(jax.grad(again, (0, 1)), X, W) == flops(jax.grad(plain, (0, 1)), X, W)


def test_branches_count_where_they_are_equal_and_loops_without_an_end_do_not() -> None:
    same = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0], lambda: x @ w[1])  # noqa: E731
    assert flops(same, X, W) == ONE
    other = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0], lambda: x)  # noqa: E731
    assert flops(other, X, W) is None
    until = lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w[0], x)  # noqa: E731
    assert flops(until, X, W) is None
    assert flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: 2 * x, x), X) == 0


def test_products_of_batches_and_convolutions_are_those_of_xla() -> None:
    for function, args in (
        (lambda a, b: jnp.einsum("btnh,bsnh->bnts", a, b), (jnp.ones((2, 3, 4, 5)), jnp.ones((2, 6, 4, 5)))),
        (lambda a, b: jnp.convolve(a, b, mode="valid"), (jnp.ones(64), jnp.ones(5))),
    ):
        analysis = jax.jit(function).lower(*args).compile().cost_analysis()
        assert flops(function, *args) == pytest.approx(analysis["flops"], rel=0.02)


def test_a_model_s_forward_pass_is_what_the_config_says() -> None:
    config = tiny_config(n_layers=3)
    params, tokens = random_params(config), jnp.ones((2, 16), jnp.int32)
    decode = lambda p: Decoder(config).apply({"params": p}, tokens).logits  # noqa: E731
    # A pass over a text computes every query against every key, seen or not.
    expected = 2 * 16 * model_cost(config, Workload(context=15)).flops
    assert flops(decode, params) == expected
    assert flops(decode, stack_layers(params)) == expected


def test_devices_have_published_numbers_or_none() -> None:
    assert set(KINDS.values()) <= set(CHIPS)
    assert chip_of("TPU v5 lite").flops == 197e12
    assert chip_of("NVIDIA H200").hbm_bandwidth == 4.8e12
    for unknown in ("cpu", "NVIDIA H100 PCIe", "TPU v9"):
        assert chip_of(unknown) is None

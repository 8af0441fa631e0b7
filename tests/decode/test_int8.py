"""Kernels in 8 bits: the same functions on rounded weights, in every way that a decoder is run."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.checkpoints.native import save_model
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.cost.stored import step_bytes, stored_bytes
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.nn.int8 import Int8Kernel, is_int8, quantised, to_int8
from elastic_lm.nn.linear import linear
from elastic_lm.testing import random_params, random_tokens, tiny_config

EXITS = (
    ExitConfig(1, kind="linear", hidden=16),
    ExitConfig(2, kind="mlp", gate=8),
    ExitConfig(3, kind="block"),
)
CONFIG = tiny_config(n_layers=4, qkv_bias=True, tied=False).with_exits(EXITS)


def rounded(params: Params) -> Params:
    """The float parameters that 8 bits stand for."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if is_int8(leaf) else leaf, quantised(params), is_leaf=is_int8
    )


def tokens_of(sampler: el.Sampler, **how: Any) -> Any:
    found = sampler.sample([1, 2, 3, 4], 12, **how)
    return found.tokens, found.exit_layers


def test_numbers_are_rounded_to_half_a_step_per_output() -> None:
    kernel = np.random.default_rng(0).normal(size=(5, 3, 40)).astype(np.float32) * [[[1], [10], [0]]]
    found = to_int8(kernel)
    assert (found.int8.dtype, found.scales.shape, found.shape) == (np.int8, (5, 3), (5, 3, 40))
    assert np.abs(found.int8).max() == 127
    assert np.all(np.abs(np.asarray(found) - kernel) <= found.scales[..., None] * 0.5001)
    np.testing.assert_array_equal(np.asarray(found)[:, 2], 0)
    on_device = to_int8(jnp.asarray(kernel))
    chex.assert_trees_all_equal(jax.device_get(on_device), found)


@pytest.mark.parametrize("tokens", [1, 2, 20, 100, 200])
def test_products_are_those_of_the_rounded_kernel(tokens: int) -> None:
    rng = np.random.default_rng(0)
    kernel, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 24, 16), (tokens, 16)))
    small, bias = to_int8(kernel), jnp.ones((2, 24))
    expected = linear(x, small.astype(jnp.float32), bias)
    np.testing.assert_allclose(linear(x, small, bias), expected, rtol=1e-5, atol=1e-5)
    assert linear(x.astype(jnp.bfloat16), small).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        tiny_config(tied=True),
        tiny_config(position="learned", norm="layernorm", gated=False, mlp_bias=True, out_bias=True),
    ],
)
def test_logits_of_all_depths_are_those_of_rounded_weights(config: ModelConfig) -> None:
    params, tokens = random_params(config), random_tokens(config, batch=2, length=9)
    run = jax.jit(Decoder(config).apply)
    found = run({"params": quantised(params)}, tokens)
    chex.assert_trees_all_close(found, run({"params": rounded(params)}, tokens), rtol=1e-4, atol=1e-4)
    whole = run({"params": params}, tokens)
    assert 0 < float(jnp.max(jnp.abs(found.logits - whole.logits))) < 0.1 * float(jnp.std(whole.logits))


def test_exits_and_lossless_write_what_full_depth_writes() -> None:
    config = CONFIG.with_exits(EXITS[:1])  # a program for each exit more
    params = random_params(config)
    small = el.Sampler(Decoder(config), quantised(params))
    wide = el.Sampler(Decoder(config), rounded(params))
    early = el.ConfidenceExit("max_prob", thresholds=(0.02,), layers=(1,))
    for how in ({}, {"exit": early}):
        assert tokens_of(small, **how) == tokens_of(wide, **how)
    assert set(tokens_of(small, exit=early)[1]) != {4}
    full = tokens_of(small)[0]
    assert tokens_of(small, exit=early, lossless=True)[0] == full
    lookup = el.Sampler(Decoder(config), quantised(params), lookup=True, lossless=True)
    assert tokens_of(lookup)[0] == full


@pytest.mark.parametrize("inside", [False, True])
def test_sub_networks_are_slices_of_the_rounded_model(inside: bool) -> None:
    config = tiny_config(n_layers=4, elastic_groups=8)
    params = random_params(config)
    subnet = el.Subnet.uniform(config, mlp=0.5, heads=0.5)
    found, expected = (
        tokens_of(el.Sampler(Decoder(config), held, slice_inside=inside), subnet=subnet)
        for held in (quantised(params), rounded(params))
    )
    assert found == expected
    _, cut = el.slice_params(config, quantised(params), subnet)
    small, wide = el.slice_params(config, rounded(params), subnet)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cut, is_leaf=is_int8), wide, rtol=1e-6
    )
    assert small.layer(0).d_mlp == config.d_mlp // 2


def size_of(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("form", ["hugging_face", "checkpoint"])
def test_load_gives_8_bits(form: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, family="llama", qkv_bias=False).with_exits(EXITS[1:2])
    params, folder = random_params(config), tmp_path / "model"
    if form == "checkpoint":
        save_model(folder, config, params, None)
    else:
        hf.export(config, params, folder)
    model, found = el.load(folder, weights="int8")
    assert model.config == el.load(folder)[0].config
    chex.assert_trees_all_equal(found, quantised(params))
    assert size_of(found) == stored_bytes(config, "int8")
    assert size_of(params) == stored_bytes(config)
    outside = {name: found[name] for name in ("embed", "exit_2")}
    assert step_bytes(config, "int8") == size_of(found) - size_of(outside)
    with pytest.raises(ValueError, match="weights='int4': must be 'int8'"):
        el.load(folder, weights="int4")


def test_what_8_bits_cannot_do_is_refused(tmp_path: Path) -> None:
    config = tiny_config(family="llama")
    small = quantised(random_params(config))
    refusal = pytest.raises(ValueError, match=r"int8 weights.*load the model without")
    with refusal:
        hf.export(config, small, tmp_path / "out")
    with refusal:
        save_model(tmp_path / "out", config, small, None)
    assert not (tmp_path / "out").exists()
    encoder = el.EncoderConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4, d_mlp=64)
    save_model(tmp_path / "encoder", encoder, el.init_params(encoder, jax.random.key(0)), None)
    with pytest.raises(ValueError, match=r"weights='int8': .*holds no decoder"):
        el.load(tmp_path / "encoder", weights="int8")


def test_rows_of_a_table_are_looked_up() -> None:
    table = to_int8(jnp.asarray(np.random.default_rng(0).normal(size=(30, 8)), jnp.float32))
    ids = jnp.asarray([[3, 4], [29, 0]])
    assert isinstance(table[ids], Int8Kernel)
    chex.assert_trees_all_equal(table[ids].astype(jnp.float32), table.astype(jnp.float32)[ids])
    chex.assert_trees_all_equal(table[:, 2:5].astype(jnp.float32), table.astype(jnp.float32)[:, 2:5])

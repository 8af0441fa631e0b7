"""A sub-network is the same model cut out or masked."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from elastic_models import EXITS, MODELS, WITH_EXITS, assert_close, logits, make

import elastic_lm as el
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.models.decoder import Decoder, Params, default_positions, stack_layers
from elastic_lm.models.exits import attach_exits
from elastic_lm.models.sharding import make_mesh, param_shardings, replicated
from elastic_lm.testing import assert_same_tree, random_params, random_tokens
from elastic_lm.width.axes import dimensions, grouped_kept
from elastic_lm.width.slicing import mask_params, slice_params


def random_subnet(config: ModelConfig, seed: int) -> Subnet:
    """Any sizes that fit."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, config.n_layers + 1))
    layers = tuple(sorted(rng.choice(config.n_layers, count, replace=False).tolist()))
    unit = config.elastic_groups or 4
    sizes = [config.sizes(i) for i in layers]
    return Subnet(
        layers,
        tuple(unit * int(rng.integers(1, f // unit + 1)) for f, _, _ in sizes),
        tuple(int(rng.integers(1, n // k + 1)) for _, n, k in sizes),
        tuple(int(rng.integers(1, k + 1)) for _, _, k in sizes),
        unit * int(rng.integers(2, config.d_model // unit + 1)),
    )


@pytest.mark.parametrize(("name", "seed"), [(n, 0) for n in MODELS] + [("llama", 1), ("of many sizes", 3)])
def test_a_slice_computes_what_the_mask_computes(name: str, seed: int) -> None:
    config, params = make(name, EXITS if name in WITH_EXITS else ())
    subnet = random_subnet(config, seed)
    small, large = logits(*slice_params(config, params, subnet)), logits(*mask_params(config, params, subnet))
    depth = {
        e.layer: subnet.layers.index(e.layer - 1) + 1 for e in config.exits if e.layer - 1 in subnet.layers
    }
    depth |= {config.n_layers: len(subnet.layers)}
    assert set(small) == set(depth.values())
    for before, after in depth.items():
        assert_close(small[after], large[before])


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_exits_with_an_affine_map_keep_the_neurons_beside_it(name: str) -> None:
    """12 neurons fill neither the layer's storage groups nor its width."""
    config, params = make(name, (ExitConfig(1, "linear", gate=4, hidden=12),), n_layers=2)
    subnet = Subnet((0,), (16,), (3,), (1,), 24)
    small, cut = slice_params(config, params, subnet)
    assert small.exits == config.exits
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, random_params(small))
    assert cut["exit_1"]["map"]["kernel"].shape == (24, 24)
    assert cut["exit_1"]["mlp"]["down"]["kernel"].shape == (24, 12)

    decoder, large = Decoder(small).bind({"params": cut}), mask_params(config, params, subnet)
    masked, tokens = Decoder(large[0]).bind({"params": large[1]}), random_tokens(config, 2, 9)
    found = decoder.exit_features(0, decoder.taps(tokens, (1,))[1])
    expected = masked.exit_features(0, masked.taps(tokens, (1,))[1])
    kept = grouped_kept(config.d_model, 24, config.elastic_groups)
    assert_close(found, expected[..., kept])
    assert not jnp.any(expected[..., ~kept])


@pytest.mark.parametrize("name", ["llama", "of many sizes"])
def test_a_slice_of_a_slice_is_one_slice(name: str) -> None:
    config, params = make(name, EXITS)
    outer = random_subnet(config, 1)
    middle = slice_params(config, params, outer)
    inner = random_subnet(middle[0], 2)
    outer.compose(inner).check(config)
    twice, once = slice_params(*middle, inner), slice_params(config, params, outer.compose(inner))
    assert twice[0] == once[0]
    assert_same_tree(twice[1], once[1])


def test_the_full_subnet_copies_nothing() -> None:
    config, params = make("llama", EXITS)
    same_config, same = slice_params(config, params, Subnet.full(config))
    assert same_config == config
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))


def test_shapes_are_those_of_the_config() -> None:
    config, params = make("llama", EXITS)
    subnet = Subnet((0, 2), (16, 40), (3, 1), (2, 1), 24)
    small, found = el.slice_params(config, params, subnet)
    assert small == subnet.sliced(config)
    assert (small.layer_mlp, small.layer_heads, small.layer_kv_heads) == ((16, 40), (6, 1), (2, 1))
    assert [e.layer for e in small.exits] == [1]
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, random_params(small))


def test_what_does_not_fit_is_refused() -> None:
    config, params = make("llama")
    subnet = Subnet((0, 1), (16, 64), (4, 4), (2, 2), 32)
    small, cut = slice_params(config, params, subnet)
    found = r"layers_1\.mlp\.down\.kernel\.shape=\(32, 64\): is \(32, 16\) in layers_0"
    with pytest.raises(ValueError, match=f"{found}, and only layers of one size"):
        stack_layers(cut)
    with pytest.raises(ValueError, match=r"params='stacked': pass them through .*unstack_layers"):
        slice_params(config, stack_layers(params), subnet)
    with pytest.raises(ValueError, match=r"subnet.mlp\[0\]=12: must be a multiple of elastic_groups=8"):
        slice_params(config, params, Subnet((0,), (12,), (4,), (2,), 32))
    with pytest.raises(ValueError, match=r"exit.init='copy': layer 1 has sizes \(16, 8, 2\)"):
        attach_exits(small, cut, (ExitConfig(1, "block"),), jax.random.key(0))
    with pytest.raises(ValueError, match=r"parameter='layers_0/mlp/side/kernel': its widths are not known"):
        dimensions(("layers_0", "mlp", "side", "kernel"))


COLLECTIVES = "all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter"


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("fsdp", [1, 2])
def test_mesh_slices_move_no_data(fsdp: int) -> None:
    """Under tensor parallelism a narrower model needs the collectives of the whole one and no other."""
    config, params = make("llama", n_kv_heads=4, n_heads=16)
    mesh = make_mesh(1, fsdp, 4, devices=jax.devices()[: 4 * fsdp])
    placed = jax.device_put(params, param_shardings(config, mesh))
    hidden = np.random.default_rng(0).normal(size=(2, 9, config.d_model)).astype(np.float32)
    there = jax.device_put(hidden, replicated(mesh))
    menu = Menu(heads=(0.25, 0.5, 1.0))

    def layers(subnet: Subnet, params: Params, hidden: jax.Array) -> jax.Array:
        small, cut = slice_params(config, params, subnet)
        decoder = Decoder(small).bind({"params": cut})
        tap, _ = decoder.run_layers(hidden, default_positions(hidden, None), 0, small.n_layers)
        return tap.hidden

    def moved(subnet: Subnet) -> dict[str, int]:
        run = jax.jit(layers, static_argnums=0)
        np.testing.assert_allclose(
            run(subnet, placed, there), layers(subnet, params, hidden), rtol=1e-4, atol=1e-4
        )
        program = run.lower(subnet, placed, there).compile().as_text()
        found = re.findall(rf"= \S+ ({COLLECTIVES})(?:-start)?\(", program)
        return {name: found.count(name) for name in set(found)}

    whole = moved(Subnet.full(config))
    assert whole["all-reduce"] >= config.n_layers
    assert moved(Subnet.uniform(config, mlp=0.25, heads=0.5)) == whole
    assert moved(menu.sample(config, np.random.default_rng(0))) == whole

"""Sub-networks of any sizes: their shapes, what a slice of a slice is, and which entries stay."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.models.registry import abstract_params
from elastic_lm.testing import tiny_config
from elastic_lm.width.axes import grouped_kept, grouped_prefix
from elastic_lm.width.slicing import slice_params

EXITS = (ExitConfig(1, "norm"), ExitConfig(2, "mlp", gate=4), ExitConfig(3, "block"))
MODELS = {
    "plain": tiny_config(n_layers=3, n_heads=6, n_kv_heads=3, d_model=24, d_mlp=32),
    "in storage groups": tiny_config(n_layers=4, n_heads=4, n_kv_heads=2, elastic_groups=4),
    "with exits": tiny_config(n_layers=3, n_heads=4, n_kv_heads=1).with_exits(EXITS),
    "tied, with learned positions": tiny_config(n_layers=2, tied=True, position="learned", norm="layernorm"),
    "of many sizes": tiny_config(
        n_layers=3, layer_mlp=(64, 32, 16), layer_heads=(4, 4, 2), layer_kv_heads=(2, 2, 1)
    ),
}
properties = functools.partial(settings, derandomize=True, deadline=None)


@st.composite
def subnets(draw: st.DrawFn, config: ModelConfig) -> Subnet:
    """Any part of a model."""
    chosen = draw(st.sets(st.integers(0, config.n_layers - 1), min_size=1))
    layers = tuple(sorted(chosen))
    unit = config.elastic_groups or 1
    sizes = [config.sizes(i) for i in layers]

    def size(most: int, of: int = 1) -> int:
        return of * draw(st.integers(1, most // of))

    return Subnet(
        layers,
        tuple(size(mlp, unit) for mlp, _, _ in sizes),
        tuple(size(heads // groups) for _, heads, groups in sizes),
        tuple(size(groups) for _, _, groups in sizes),
        size(config.d_model, unit),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_slice_has_the_shapes_of_the_smaller_model(name: str) -> None:
    config = MODELS[name]
    whole = nn.unbox(abstract_params(config))

    @properties(max_examples=12)
    @given(subnets(config))
    def check(subnet: Subnet) -> None:
        subnet.check(config)
        small = subnet.sliced(config)
        found = jax.eval_shape(lambda params: slice_params(config, params, subnet)[1], whole)
        wanted = nn.unbox(abstract_params(small))
        assert jax.tree.map(lambda leaf: leaf.shape, found) == jax.tree.map(lambda leaf: leaf.shape, wanted)

    check()


@pytest.mark.parametrize("name", MODELS)
def test_a_part_of_a_part_is_a_part(name: str) -> None:
    config = MODELS[name]

    @properties(max_examples=60)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        outer = data.draw(subnets(config))
        middle = outer.sliced(config)
        inner = data.draw(subnets(middle))
        once = outer.compose(inner)
        once.check(config)
        assert once.sliced(config) == inner.sliced(middle)
        assert outer.compose(Subnet.full(middle)) == outer
        assert Subnet.full(config).compose(outer) == outer

    check()


@properties(max_examples=60)
@given(groups=st.sampled_from([0, 1, 2, 4]), size=st.integers(1, 16), axis=st.sampled_from([0, 1]))
def test_the_leading_entries_of_every_storage_group_stay(groups: int, size: int, axis: int) -> None:
    size -= size % max(groups, 1)
    if not size:
        return
    leaf = np.arange(3 * 16).reshape((16, 3) if axis == 0 else (3, 16))
    kept = grouped_kept(16, size, groups)
    assert kept.sum() == size
    assert np.array_equal(grouped_prefix(leaf, axis, size, groups), np.compress(kept, leaf, axis))


@properties(max_examples=60)
@given(st.data())
def test_every_choice_of_a_menu_is_found_again(data: st.DataObject) -> None:
    config = MODELS["in storage groups"]
    shares = st.sets(st.sampled_from([0.25, 0.5, 0.75]), max_size=3)
    mlp = (*sorted(data.draw(shares)), 1.0)
    dropped = tuple(data.draw(st.lists(st.integers(0, 3), unique=True, max_size=3)))
    menu = Menu(mlp=mlp, heads=(0.5, 1.0), groups=(0.5, 1.0), dropped=dropped)

    subnet = menu.sample(config, np.random.default_rng(data.draw(st.integers(0, 99))))
    subnet.check(config)
    sizes, (at, heads, groups) = menu.sizes(config), menu.positions(config, subnet)
    assert subnet.mlp == tuple(sizes.mlp[i][j] for i, j in zip(subnet.layers, at, strict=True))
    assert subnet.heads == tuple(sizes.heads[i][j] for i, j in zip(subnet.layers, heads, strict=True))
    assert subnet.groups == tuple(sizes.groups[i][j] for i, j in zip(subnet.layers, groups, strict=True))
    assert menu.indices(config, subnet)[3] == tuple(i in subnet.layers for i in range(config.n_layers))

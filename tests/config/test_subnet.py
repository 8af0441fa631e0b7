"""Subnets, menus and budgets: what they hold, and what they refuse."""

import dataclasses

import numpy as np
import pytest

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.testing import tiny_config

CONFIG = tiny_config(n_heads=8, n_kv_heads=2, elastic_groups=16)  # 4 layers, 64 neurons, 4 heads per group


def test_full_and_uniform() -> None:
    assert Subnet.full(CONFIG) == Subnet((0, 1, 2, 3), (64,) * 4, (4,) * 4, (2,) * 4, 32)
    half = Subnet.uniform(CONFIG, mlp=0.25, heads=0.5, groups=0.5, d_model=0.5, depth=0.5)
    assert half == Subnet((0, 1), (16, 16), (2, 2), (1, 1), 16)
    assert Subnet.uniform(CONFIG, layers=(0, 3)).layers == (0, 3)
    assert hash(half) == hash(dataclasses.replace(half))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"mlp": 0.3},
            r"mlp=0.3: must give a multiple of 16 of 64 neurons; nearest: 0.25 \(16\), 0.5 \(32\)",
        ),
        ({"mlp": 0.1}, r"nearest: 0.25 \(16\)$"),
        ({"mlp": 1.5}, r"mlp=1.5: .* nearest: 1 \(64\)"),
        ({"mlp": -0.5}, r"mlp=-0.5: .* nearest: 0.25"),
        ({"heads": 0.3}, r"heads=0.3: .* of the 4 heads per group; nearest: 0.25 \(1\), 0.5 \(2\)"),
        ({"groups": 0.25}, r"groups=0.25: .* nearest: 0.5 \(1\)"),
        (
            {"d_model": 0.7},
            r"d_model=0.7: must give a multiple of 16 of 32 channels; nearest: 0.5 \(16\), 1 \(32\)",
        ),
        ({"depth": 0.3}, r"depth=0.3: .* nearest: 0.25 \(1\), 0.5 \(2\)"),
        ({"layers": (0, 4)}, r"subnet.layers=\(0, 4\): the model has 4 layers"),
        ({"layers": (1, 0)}, "increasing order"),
        ({"layers": (0,), "depth": 0.5}, "depth=0.5: leave it at 1"),
    ],
)
def test_shares_that_do_not_fit_are_named(choice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subnet.uniform(CONFIG, **choice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": (64, 64, 64, 128)}, r"subnet.mlp\[3\]=128: there are 64 MLP neurons of layer 3"),
        ({"mlp": (64, 24, 64, 64)}, r"subnet.mlp\[1\]=24: must be a multiple of elastic_groups=16"),
        ({"heads": (4, 4, 5, 4)}, r"subnet.heads\[2\]=5: there are 4 heads per group of layer 2"),
        ({"groups": (3, 2, 2, 2)}, r"subnet.groups\[0\]=3: there are 2"),
        ({"d_model": 24}, r"subnet.d_model=24: must be a multiple of elastic_groups=16"),
        ({"layers": (0, 1, 2, 7)}, r"subnet.layers=.*: the model has 4 layers"),
        ({"heads": (4, 4)}, "needs one size of at least 1 for each of the 4"),
        ({"groups": (0, 1, 1, 1)}, "at least 1"),
    ],
)
def test_a_subnet_is_checked_against_the_model(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Subnet.full(CONFIG), **change).check(CONFIG)


def test_compose_expresses_a_slice_of_a_slice() -> None:
    outer = Subnet.uniform(CONFIG, layers=(0, 2, 3), mlp=0.5)
    inner = Subnet((1, 2), (16, 32), (2, 2), (2, 2), 32)
    assert outer.compose(inner) == Subnet((2, 3), (16, 32), (2, 2), (2, 2), 32)
    with pytest.raises(ValueError, match="the sliced model has 3 layers"):
        outer.compose(Subnet.full(CONFIG))


def test_menu_gives_sizes_and_samples_from_them() -> None:
    menu = Menu(heads=(0.25, 1.0), groups=(0.5, 1.0), d_model=(0.5, 1.0), dropped=(2, 1))
    sizes = menu.sizes(CONFIG)
    assert sizes.mlp == ((16, 32, 48, 64),) * 4
    assert (sizes.heads[0], sizes.groups[0], sizes.d_model) == ((1, 4), (1, 2), (16, 32))
    assert menu.smallest(CONFIG) == Subnet((0, 3), (16,) * 2, (1,) * 2, (1,) * 2, 16)
    assert menu.largest(CONFIG) == Subnet.full(CONFIG)
    rng = np.random.default_rng(0)
    drawn = [menu.sample(CONFIG, rng) for _ in range(200)]
    assert {s.layers for s in drawn} == {(0, 1, 2, 3), (0, 1, 3), (0, 3)}
    assert {size for s in drawn for size in s.mlp} == {16, 32, 48, 64}
    assert any(len(set(s.mlp)) > 1 for s in drawn)
    for s in drawn:
        s.check(CONFIG)
    same = [menu.sample(CONFIG, rng, uniform=True) for _ in range(50)]
    assert all(len(set(sizes)) == 1 for s in same for sizes in (s.mlp, s.heads, s.groups))
    assert menu.sample(CONFIG, np.random.default_rng(7)) == menu.sample(CONFIG, np.random.default_rng(7))


def test_menu_finds_the_indices_of_a_subnet() -> None:
    menu = Menu(groups=(0.5, 1.0), dropped=(1,))
    subnet = Subnet((0, 2, 3), (16, 64, 32), (4, 2, 4), (2, 1, 2), 32)
    mlp, heads, groups, keep = menu.indices(CONFIG, subnet)
    assert (mlp, heads, groups) == ((0, 0, 3, 1), (1, 0, 0, 1), (1, 0, 0, 1))
    assert keep == (True, False, True, True)
    with pytest.raises(ValueError, match=r"subnet.heads\[0\]=1: is not on the menu: choose from \(2, 4\)"):
        menu.indices(CONFIG, dataclasses.replace(subnet, heads=(1, 2, 4)))
    with pytest.raises(ValueError, match=r"subnet.groups\[1\]=1: is not on the menu: choose from \(2,\)"):
        Menu().indices(CONFIG, subnet)
    with pytest.raises(ValueError, match=r"subnet.d_model=16: .* not switched"):
        menu.indices(CONFIG, dataclasses.replace(subnet, d_model=16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp": (0.5,)}, r"menu.mlp=\(0.5,\): must be shares"),
        ({"heads": (1.0, 0.5)}, "menu.heads"),
        ({"groups": (0.0, 1.0)}, "menu.groups"),
        ({"d_model": ()}, "menu.d_model"),
        ({"dropped": (1, 1)}, "menu.dropped"),
    ],
)
def test_menus_that_make_no_sense_are_refused(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Menu(**fields)


def test_a_menu_names_the_choice_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"menu.mlp=0.3: .* nearest: 0.25 \(16\), 0.5 \(32\)"):
        Menu(mlp=(0.3, 1.0)).sizes(CONFIG)
    with pytest.raises(ValueError, match=r"menu.heads=0.5: .* of the 1 heads per group; nearest: 1 \(1\)"):
        Menu().sizes(tiny_config(n_kv_heads=4))
    with pytest.raises(ValueError, match=r"menu.dropped=\(0, 1, 2, 3\): .* one of which must stay"):
        Menu(dropped=(0, 1, 2, 3)).sizes(CONFIG)


def test_a_budget_is_one_number() -> None:
    budget = Budget(latency_ms=12)
    assert (budget.kind, budget.amount) == ("latency_ms", 12.0)
    for wrong, message in [({}, "exactly one"), ({"flops": 1.0, "parameters": 2.0}, "exactly one")]:
        with pytest.raises(ValueError, match=message):
            Budget(**wrong)
    with pytest.raises(ValueError, match=r"budget.memory_bytes=0.0: must be positive"):
        Budget(memory_bytes=0)


def test_layer_sizes_have_one_spelling() -> None:
    config = tiny_config(layer_mlp=(64, 64, 64, 64))
    assert config == tiny_config()
    mixed = tiny_config(layer_mlp=(16, 64, 32, 8), layer_heads=(4, 2, 4, 3), layer_kv_heads=(2, 2, 1, 1))
    assert mixed.heterogeneous
    assert mixed.sizes(3) == (8, 3, 1)
    assert (mixed.layer(3).d_mlp, mixed.layer(3).n_heads, mixed.layer(3).heterogeneous) == (8, 3, False)
    assert mixed.layer(1).head_dim == mixed.head_dim == 8
    assert mixed.with_layers((1, 2)).layer_mlp == (64, 32)
    assert mixed.with_layers((2,)) == tiny_config(n_layers=1, d_mlp=32, n_kv_heads=1)
    assert from_dict(ModelConfig, to_dict(mixed)) == mixed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_mlp": (64, 64)}, r"layer_mlp=\(64, 64\): needs 4 sizes"),
        ({"layer_mlp": (32, 32, 32, 16)}, "the largest d_mlp=64"),
        ({"layer_heads": (4, 4, 4, 0)}, "layer_heads=.* at least 1"),
        ({"layer_heads": (4, 4, 3, 4)}, "n_kv_heads=2: must divide n_heads=3 of layer 2"),
        ({"elastic_groups": 48}, "elastic_groups=48: must divide d_mlp=64; choose 16"),
        ({"elastic_groups": 16, "layer_mlp": (64, 24, 64, 64)}, "must divide d_mlp=24 of layer 1; choose 8"),
        ({"elastic_groups": -1}, "elastic_groups=-1"),
        ({"norm_width": 33}, "norm_width=33: must be at most d_model=32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)

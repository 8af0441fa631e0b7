"""Named sub-networks: names that say what is kept, and tables that find, add and remove them."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.config.subnet_table import NAME, MeasuredLoss, SubnetTable, name_of
from elastic_lm.cost.named_subnets import default_subnets, named_subnet
from elastic_lm.models.registry import abstract_params
from elastic_lm.testing import tiny_config
from elastic_lm.width.elastic_training import uniform_subnets

CONFIG = tiny_config(exits=(1, 3), n_heads=8, n_kv_heads=2, head_dim=8, elastic_groups=16)
MENU = Menu(mlp=(0.25, 0.5, 1.0), heads=(0.5, 1.0), dropped=(2, 1))


def test_default_names_span_the_menu_and_count_parameters() -> None:
    table = default_subnets(CONFIG, MENU)
    assert list(table)[-1] == "whole"
    assert {"w25-h50", "w50-h50", "w25", "w50", "h50", "d3", "d2", "d2-w25-h50"} < set(table)
    assert table["d2-w25-h50"].subnet == MENU.smallest(CONFIG)
    assert set(uniform_subnets(CONFIG, MENU).values()) <= {one.subnet for one in table.values()}
    parameters = [one.parameters for one in table.values()]
    assert parameters == sorted(parameters)
    for one in (table["d2-w25-h50"], table["w50"]):
        held = abstract_params(one.subnet.sliced(CONFIG).with_exits(()))
        assert one.parameters == sum(leaf.size for leaf in jax.tree.leaves(held))
    assert all(one.loss is one.time is None for one in table.values())


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 10**6))
def test_names_are_names_and_survive_json(seed: int) -> None:
    subnet = MENU.sample(CONFIG, np.random.default_rng(seed))
    name = name_of(CONFIG, subnet)
    assert NAME.fullmatch(name)
    assert (name == "whole") == (subnet == Subnet.full(CONFIG))
    table = SubnetTable(default_subnets(CONFIG, MENU).sizes, (named_subnet(CONFIG, subnet),), "abc")
    assert from_dict(SubnetTable, to_dict(table)) == table


def test_an_unknown_name_says_which_are_near() -> None:
    table = default_subnets(CONFIG, MENU)
    assert table.find("w50").subnet == Subnet.uniform(CONFIG, mlp=0.5)
    with pytest.raises(ValueError, match=r"subnet='w5': the model has no sub-network .* did you mean .*w50"):
        table.find("w5")
    with pytest.raises(ValueError, match=r"there are .*w25, .*whole"):
        table.find("enormous!")


def test_tables_change_as_values() -> None:
    table = default_subnets(CONFIG, MENU)
    other = named_subnet(CONFIG, Subnet.uniform(CONFIG, mlp=0.25, layers=(0, 3)), "mine")
    added = table.adding([other, table["w50"]])
    assert (len(added), list(added)[-1]) == (len(table) + 1, "mine")
    assert added.without("mine") == table
    with pytest.raises(ValueError, match=r"subnets\.name='w50': is the name of another sub-network"):
        table.adding([dataclasses.replace(other, name="w50")])
    with pytest.raises(ValueError, match=r"subnets\.name='-x'"):
        dataclasses.replace(other, name="-x")
    with pytest.raises(ValueError, match=r"subnets\.name='mine': stands twice"):
        dataclasses.replace(table, subnets=(other, other))


def test_numbers_are_of_the_weights_that_were_measured() -> None:
    table = default_subnets(CONFIG, MENU).of_weights("a")
    loss = MeasuredLoss(1.5, 100, "text")
    measured = table.replacing([dataclasses.replace(table["w50"], loss=loss)])
    assert measured.of_weights("a")["w50"].loss == loss
    assert measured.of_weights("b")["w50"].loss is None
    assert list(measured.of_weights("b")) == list(measured)


def test_a_table_of_another_model_is_refused() -> None:
    table = default_subnets(CONFIG, MENU)
    with pytest.raises(ValueError, match=r"subnets\.sizes\.layers="):
        table.check(dataclasses.replace(CONFIG, n_layers=6))
    sliced = Subnet.uniform(CONFIG, mlp=0.5).sliced(CONFIG)
    assert table.fits(CONFIG)
    assert not table.fits(sliced)

"""Exits in closed form, affine maps with or without an MLP, are exported and read back bit by bit."""

import pathlib

import pytest

from elastic_lm import hf
from elastic_lm.config.model import ExitConfig
from elastic_lm.testing import assert_same_tree, random_params, tiny_config


@pytest.mark.parametrize("hidden", [0, 48])
def test_an_affine_map_is_read_back(tmp_path: pathlib.Path, hidden: int) -> None:
    exits = (ExitConfig(1, kind="linear", tied=True, hidden=hidden), ExitConfig(2, kind="norm"))
    config = tiny_config(n_layers=3).with_exits(exits)
    params = random_params(config)
    hf.export(config, params, tmp_path / "hf")
    loaded, again = hf.load(tmp_path / "hf")
    assert loaded.exits == exits
    assert_same_tree(params, again)

"""What trains is float32, whatever dtype the weights are loaded in; what is frozen stays as it is."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import changed

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.checkpoints.native import save_model
from elastic_lm.config.model import ExitConfig
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.models.sharding import make_mesh, param_shardings
from elastic_lm.testing import random_params, tiny_config
from elastic_lm.train.config import RunConfig, TrainConfig
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.run import fit
from elastic_lm.train.state import create_state

HALF = {"dtype": "bfloat16", "param_dtype": "bfloat16"}


def dtypes(tree: Any) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


def moved(old: Any, new: Any) -> float:
    """Share of the numbers that differ."""
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    changes = [np.ravel(np.asarray(a, np.float32) != np.asarray(b, np.float32)) for a, b in pairs]
    return float(np.mean(np.concatenate(changes)))


@pytest.fixture
def half(run_config: RunConfig, text_file: Path, tmp_path: Path) -> RunConfig:
    """Five small steps from a checkpoint in bfloat16."""
    assert run_config.model is not None
    model = dataclasses.replace(run_config.model, **HALF)
    tokenizer = train_bpe([text_file.read_text()], model.vocab_size)
    save_model(tmp_path / "half", model, random_params(model), tokenizer)
    small = {"lr": 1e-4, "warmup": 0, "schedule": "constant", "steps": 5, "eval_every": 0, "save_every": 5}
    config = changed(run_config, init_from=str(tmp_path / "half"), **small)
    return dataclasses.replace(config, model=None)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_masters_and_moments(optimizer: str) -> None:
    config = tiny_config(n_layers=1, **HALF)
    params = jax.device_put(random_params(config), param_shardings(config, make_mesh()))
    assert dtypes(params) == {"bfloat16"}

    def state_of(**options: str) -> Any:
        train = TrainConfig(optimizer=optimizer, **options)
        return create_state(make_optimizer(train), params, train.param_dtype or "float32")

    assert dtypes(state_of()) == {"float32"}
    chosen = state_of(param_dtype="bfloat16")
    assert (dtypes(chosen.params), dtypes(chosen.opt_state)) == ({"bfloat16"}, {"float32"})
    assert dtypes(state_of(mu_dtype="bfloat16").opt_state) == {"bfloat16", "float32"}
    with pytest.raises(ValueError, match=r"train\.mu_dtype='half': must be one of"):
        TrainConfig(mu_dtype="half")


def test_a_chosen_half_precision_computes_its_updates_in_float32() -> None:
    optimizer = make_optimizer(TrainConfig(clip=0.0, warmup=0, schedule="constant", weight_decay=0.0))
    params = {"norm": {"scale": jnp.full(4, 0.1, jnp.bfloat16)}}
    gradients = {"norm": {"scale": jnp.asarray([1e-3, 2e-3, 3e-3, 4e-3], jnp.bfloat16)}}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, gradients))
    state, wide_state = optimizer.init(params), optimizer.init(wide[0])
    for _ in range(3):
        updates, state = optimizer.update(gradients, state, params)
        wide_updates, wide_state = optimizer.update(wide[1], wide_state, wide[0])
    chex.assert_trees_all_equal(state, wide_state)
    chex.assert_trees_all_equal(updates, wide_updates)
    assert dtypes(optax.apply_updates(params, updates)) == {"bfloat16"}


def test_every_weight_of_a_half_precision_model_moves(half: RunConfig, tmp_path: Path, capsys) -> None:
    _, before = el.load(half.train.init_from)
    model, params, _ = fit(half, tmp_path / "run")
    first = capsys.readouterr().out.splitlines()[0]
    count = f"{sum(p.size for p in jax.tree.leaves(params)):,}"
    assert first.startswith(f"{count} of {count} parameters train on ")
    assert " in float32, optimizer in float32; mesh: " in first
    assert (model.dtype, model.param_dtype, dtypes(params)) == ("bfloat16", "float32", {"float32"})
    assert moved(before, params) > 0.999

    again, loaded = el.load(tmp_path / "run" / "model")
    assert again.config == model
    chex.assert_trees_all_equal(loaded, params)

    # Rounded to the file's dtype, most of what was learned would be lost.
    chosen = changed(half, param_dtype="bfloat16", mu_dtype="bfloat16")
    _, rounded, _ = fit(chosen, tmp_path / "chosen")
    first = capsys.readouterr().out.splitlines()[0]
    assert " in bfloat16, mean gradient in bfloat16, optimizer in float32; mesh: " in first
    assert moved(before, rounded) < 0.6


def test_exits_train_in_float32_over_a_frozen_backbone(half: RunConfig, tmp_path: Path, capsys) -> None:
    run = dataclasses.replace(changed(half, method="ee_tuning"), exits=(ExitConfig(1, "norm"),))
    _, before = el.load(half.train.init_from)
    model, params, _ = fit(run, tmp_path / "run")
    first = capsys.readouterr().out.splitlines()[0]
    assert " in float32, optimizer in float32; the others stay in bfloat16; mesh: " in first
    exit_params = params.pop("exit_1")
    assert (dtypes(params), dtypes(exit_params), model.param_dtype) == ({"bfloat16"}, {"float32"}, "bfloat16")
    chex.assert_trees_all_equal(params, before)
    assert moved(before["embed"]["table"], exit_params["head"]["kernel"]) > 0.999

    folder = tmp_path / "run" / "model"
    _, loaded = el.load(folder)
    chex.assert_trees_all_equal(loaded, {**params, "exit_1": exit_params})
    assert dtypes(el.load(folder, dtype="bfloat16")[1]) == {"bfloat16"}

    # A wider dtype is that of the file, not of what was rounded before.
    wide = el.load(folder, dtype="float32")[1]
    chex.assert_trees_all_equal(wide["exit_1"], exit_params)
    hf.export(model, loaded, tmp_path / "hf")
    chex.assert_trees_all_equal(hf.load(tmp_path / "hf", dtype="float32")[1], wide)


@pytest.mark.long
def test_a_new_model_is_saved_in_the_dtype_of_its_config(run_config: RunConfig, tmp_path: Path) -> None:
    assert run_config.model is not None
    new = dataclasses.replace(
        changed(run_config, steps=3), model=dataclasses.replace(run_config.model, **HALF)
    )
    model, params, _ = fit(new, tmp_path)
    assert (model.param_dtype, dtypes(params)) == ("bfloat16", {"bfloat16"})

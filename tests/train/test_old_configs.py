"""Configs and runs of 0.1, where `train` held the options of all methods."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.config.parse import to_dict
from elastic_lm.train.config import RunConfig, TrainConfig
from elastic_lm.train.identity import check_identity
from elastic_lm.train.old_configs import MOVED, OPTIONS, upgraded
from elastic_lm.train.recipes import load_config
from elastic_lm.train.registry import METHODS, method_class


def recipe(tmp_path: Path, values: dict[str, Any]) -> str:
    file = tmp_path / "recipe.py"
    file.write_text(f"def get_config(arg=''):\n    return {values!r}\n")
    return str(file)


def test_every_old_option_has_a_new_place() -> None:
    assert {key for keys in MOVED.values() for key in keys} == set(OPTIONS)
    assert set(MOVED) == set(METHODS)
    for name, keys in MOVED.items():
        fields = {field.name for field in dataclasses.fields(method_class(name).section)}
        assert {new.partition(".")[0] for new in keys.values()} <= fields
        assert not set(keys) & {field.name for field in dataclasses.fields(TrainConfig)}


def test_an_old_recipe_is_read_with_a_warning(tmp_path: Path) -> None:
    train = {"method": "flextron", "init_from": "model", "menu_mlp": (0.5, 1.0), "distil": 0.5, "lr": 1e-4}
    with pytest.warns(FutureWarning, match=r"method\.name='flextron', method\.menu\.mlp for train\.menu_mlp"):
        run = load_config(recipe(tmp_path, {"train": train}))
    assert (run.method.menu.mlp, run.method.menu.heads, run.method.distil) == ((0.5, 1.0), (1.0,), 0.5)
    assert run.train.lr == 1e-4


def test_an_old_override_of_a_new_recipe_is_read_with_a_warning(tmp_path: Path) -> None:
    values = {"method": {"name": "ee_tuning"}, "exits": [{"layer": 1}], "train": {"init_from": "model"}}
    with pytest.warns(FutureWarning, match=r"method\.weights for train\.exit_weights"):
        run = load_config(recipe(tmp_path, values), ["train.exit_weights=(0.5,)"])
    assert run.method.weights == (0.5,)


def test_a_run_of_the_old_form_is_the_same_run(tmp_path: Path) -> None:
    """run.json of 0.1 held every option of every method."""
    new = RunConfig(
        train=TrainConfig(init_from="model"),
        method=method_class("sorted_finetuning").section(depths=(1, 2)),
    )
    values = json.loads(json.dumps(to_dict(new)))
    del values["mesh"]
    for key in ("steps", "log_every", "eval_every", "eval_batches", "save_every", "keep"):
        del values["train"][key]
    del values["method"]
    values["train"] |= {"method": "sorted_finetuning", "depths": [1, 2], "depth_weights": "uniform"}
    values["train"] |= {"depth_scale": 1.0, "curriculum": "all", "curriculum_period": 0, "layer_dropout": 0.0}
    values["train"] |= {"dropout_ramp": 0, "exit_weights": [], "menu_mlp": [0.25, 1.0], "top_k": 0}
    (tmp_path / "run.json").write_text(json.dumps(values))
    check_identity(new, tmp_path)
    other = dataclasses.replace(new, method=dataclasses.replace(new.method, depths=(1,)))
    with pytest.raises(ValueError, match=r"method\.depths=.*not .*choose another workdir"):
        check_identity(other, tmp_path)


def test_todays_form_stays_as_it_is() -> None:
    values = {"train": {"lr": 1e-3}, "method": {"name": "joint", "weights": (1.0,)}}
    assert upgraded(values) is values


def test_a_method_named_twice_is_refused_where_the_names_differ(tmp_path: Path) -> None:
    file = recipe(tmp_path, {"method": {"name": "ee_tuning"}, "train": {"init_from": "model"}})
    with pytest.raises(ValueError, match=r"train\.method='joint': the config has method\.name='ee_tuning'"):
        load_config(file, ["train.method=joint"])


def test_defaults_of_other_methods_are_read(tmp_path: Path) -> None:
    train = {"method": "flextron", "init_from": "model", "exit_weights": (), "z_loss": 0.0}
    with pytest.warns(FutureWarning, match=r"method\.name='flextron'"):
        assert load_config(recipe(tmp_path, {"train": train})).method.name == "flextron"


def test_the_values_given_stay_as_they_are() -> None:
    values = {"train": {"menu_mlp": (0.5, 1.0)}, "method": {"name": "flextron", "menu": {"heads": (1.0,)}}}
    with pytest.warns(FutureWarning):
        assert upgraded(values)["method"]["menu"] == {"heads": (1.0,), "mlp": (0.5, 1.0)}
    assert values["method"]["menu"] == {"heads": (1.0,)}

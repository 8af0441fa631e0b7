"""Whole runs that train routers for an elastic model."""

import dataclasses
import json
from pathlib import Path

import chex
import numpy as np
import pytest
from training_runs import Stopped, changed, stop_at

from elastic_lm.checkpoints.native import load_menu, load_model, save_model
from elastic_lm.config.subnet import Budget, Menu
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.files.subnet_files import load_subnets
from elastic_lm.models.decoder import Decoder
from elastic_lm.train.config import RunConfig
from elastic_lm.train.recipes import load_config
from elastic_lm.train.run import fit
from elastic_lm.width.chooser import SubnetChooser
from elastic_lm.width.trained_routers import Routers

MENU = Menu((0.25, 0.5, 1.0), (0.5, 1.0))
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def elastic(run_config: RunConfig, tmp_path: Path) -> RunConfig:
    """A run of routers from an elastic checkpoint of two layers."""
    model, params, _ = fit(changed(run_config, steps=3, eval_every=0), tmp_path / "base")
    folder, source = tmp_path / "elastic", tmp_path / "base" / "model"
    save_model(
        folder, dataclasses.replace(model, elastic_groups=8), params, Tokenizer.load(source), menu=MENU
    )
    options = {"method": "routers", "init_from": str(folder), "router_width": 16, "budgets": (0.65, 0.8, 1.0)}
    return dataclasses.replace(changed(run_config, eval_every=0, **options), model=None)


@pytest.mark.long
def test_routers_resume_bit_identically_and_serve_budgets(
    elastic: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(elastic, scheme="surrogate")
    model, params, metrics = fit(config, tmp_path / "straight")
    chex.assert_trees_all_equal(params, load_model(config.train.init_from)[1])
    assert {"loss/budget_0.65", "spent/budget_0.9", "loss/budget_1"} <= set(metrics)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            fit(config, tmp_path / "stopped")
    fit(config, tmp_path / "stopped")
    folders = [tmp_path / name / "model" for name in ("straight", "stopped")]
    first, second = (Routers.load(folder, model) for folder in folders)
    chex.assert_trees_all_equal(first.params, second.params)

    assert load_menu(folders[0]) == MENU
    assert load_subnets(folders[0], model) == load_subnets(config.train.init_from)
    chosen = SubnetChooser.load(folders[0], model)
    budget = Budget(parameters=0.7 * chosen.costs("parameters").range(MENU)[1])
    found = Sampler(Decoder(model), params, elastic=chosen, budget=budget).sample([1, 2, 3], 2)
    assert found.stats.subnet == first.subnet(budget)
    flops = Budget(flops=0.7 * chosen.costs("flops").range(MENU)[1])
    total = chosen.costs("flops").total(model, MENU, chosen.subnet(flops))
    assert 0.85 * flops.amount < total <= flops.amount
    with pytest.raises(ValueError, match=r"method\.router_width=8: the routers in .* have 16"):
        fit(changed(config, init_from=str(folders[0]), router_width=8), tmp_path / "other")


@pytest.mark.long
def test_routers_of_states_are_tilted_on_held_out_text(elastic: RunConfig, tmp_path: Path) -> None:
    model, _, _ = fit(changed(elastic, reads="hidden", steps=3), tmp_path / "by_token")
    routers = Routers.load(tmp_path / "by_token" / "model", model)
    assert len(routers.tilts) == 3
    assert routers.tilts[-1] == 0
    without = dataclasses.replace(elastic.data, eval_paths=())
    with pytest.raises(ValueError, match=r"method\.reads='hidden': .* name more in data\.eval_paths"):
        fit(dataclasses.replace(changed(elastic, reads="hidden"), data=without), tmp_path / "blind")


@pytest.mark.long
def test_the_model_trains_along_where_asked(elastic: RunConfig, tmp_path: Path) -> None:
    joint = changed(elastic, train_model=True, lr=1e-3, router_lr=10.0, distil=0.5, steps=3)
    _, params, _ = fit(joint, tmp_path / "joint")
    before = load_model(elastic.train.init_from)[1]
    assert not np.array_equal(params["embed"]["table"], before["embed"]["table"])


def test_impossible_settings_are_named(elastic: RunConfig, tmp_path: Path) -> None:
    cases = [
        ({"budgets": (0.01, 1.0)}, r"budget\.parameters=.*: the cheapest sub-network of this menu"),
        ({"priced": "latency_ms", "latency_table": "no.json"}, r"no\.json: no such latency table"),
    ]
    for options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            fit(changed(elastic, **options), tmp_path / "refused")
    with pytest.raises(ValueError, match=r"method\.latency_table=''.*elastic-lm latency build"):
        changed(elastic, priced="latency_ms")
    with pytest.raises(ValueError, match=r"train\.init_from=''.*name its folder"):
        changed(elastic, init_from="")
    with pytest.raises(ValueError, match=r"train_model=True: not read with method\.scheme='surrogate'"):
        changed(elastic, scheme="surrogate", train_model=True)
    for name in ("menu.json", "checksums.json"):
        (Path(elastic.train.init_from) / name).unlink()
    with pytest.raises(FileNotFoundError, match="--config flextron"):
        fit(elastic, tmp_path / "refused")


@pytest.mark.parametrize("variant", ["static", "surrogate", "by_token", "joint"])
def test_the_recipe_has_variants(variant: str) -> None:
    config = load_config(f"{CONFIGS / 'routers.py'}:runs/e/model,{variant}")
    assert config.method.name == "routers"
    assert config.train.init_from == "runs/e/model"
    json.dumps(dataclasses.asdict(config))
    with pytest.raises(ValueError, match="choose from static, surrogate, by_token, joint"):
        load_config(f"{CONFIGS / 'routers.py'}:runs/e/model,other")

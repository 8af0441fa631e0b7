"""A whole run on eight devices, resumed on another mesh."""

import dataclasses
from pathlib import Path

import chex
import jax
import pytest
from training_runs import changed

from elastic_lm.checkpoints.native import save_model
from elastic_lm.config.mesh import MeshConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.train.config import RunConfig
from elastic_lm.train.run import fit
from elastic_lm.width.trained_routers import Routers

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


@eight
def test_a_run_on_one_mesh_continues_on_another(run_config: RunConfig, tmp_path: Path) -> None:
    config = changed(run_config, schedule="constant", eps=1e-3)
    one = dataclasses.replace(config, mesh=MeshConfig(data=8))
    other = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    _, straight, _ = fit(one, tmp_path / "straight")
    fit(changed(one, steps=4), tmp_path / "moved")
    _, moved, _ = fit(other, tmp_path / "moved")
    chex.assert_trees_all_close(jax.device_get(moved), jax.device_get(straight), rtol=1e-3, atol=1e-5)


@eight
def test_routers_of_any_mesh_are_the_same(run_config: RunConfig, tmp_path: Path) -> None:
    model, params, _ = fit(changed(run_config, steps=3, eval_every=0), tmp_path / "base")
    model, menu = dataclasses.replace(model, elastic_groups=8), Menu((0.25, 0.5, 1.0), (0.5, 1.0))
    tokenizer = Tokenizer.load(tmp_path / "base" / "model")
    save_model(tmp_path / "elastic", model, params, tokenizer, menu=menu)
    options = {"init_from": str(tmp_path / "elastic"), "router_width": 16, "budgets": (0.65, 0.8, 1.0)}
    config = changed(run_config, eval_every=0, steps=3, method="routers", **options)
    found = {}
    for name, mesh in {"rows": MeshConfig(data=8), "all": MeshConfig(data=2, fsdp=2, tensor=2)}.items():
        fit(dataclasses.replace(config, model=None, mesh=mesh), tmp_path / name)
        found[name] = Routers.load(tmp_path / name / "model", model).params
    chex.assert_trees_all_close(found["all"], found["rows"], rtol=1e-3, atol=1e-4)


@eight
def test_rows_that_do_not_spread_are_refused(run_config: RunConfig, tmp_path: Path) -> None:
    data = dataclasses.replace(run_config.data, batch_size=12)
    with pytest.raises(ValueError, match="batch_size=12"):
        fit(dataclasses.replace(run_config, data=data), tmp_path)

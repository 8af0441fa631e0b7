"""Whole runs of the methods that train nested sub-models or exits without labels."""

import dataclasses
from pathlib import Path

import chex
import pytest
from conftest import changed
from test_run import Stopped, metric_lines, stop_at

from elastic_lm.config import ExitConfig, RunConfig
from elastic_lm.train.run import fit


@pytest.fixture
def base(run_config: RunConfig, tmp_path: Path) -> RunConfig:
    """A run from a checkpoint of two layers."""
    fit(changed(run_config, steps=3, eval_every=0), tmp_path / "base")
    run = changed(run_config, init_from=str(tmp_path / "base" / "model"), eval_every=0)
    return dataclasses.replace(run, model=None)


def test_layerskip_resumes_bit_identically(base: RunConfig, tmp_path: Path, monkeypatch) -> None:
    options = {"depth_weights": "layerskip", "curriculum": "sampled", "layer_dropout": 0.3}
    config = changed(base, method="sorted_finetuning", **options)
    _, straight, metrics = fit(config, tmp_path / "straight")
    # Held-out text is read by every sub-model, with all its layers; steps of one sub-model report the loss.
    assert {"loss/depth_1", "loss/final"} <= set(metrics)
    assert not any("depth" in name for name in metric_lines(tmp_path / "straight")[0])
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stopped):
            fit(config, tmp_path / "stopped")
    _, resumed, again = fit(config, tmp_path / "stopped")
    chex.assert_trees_all_equal(straight, resumed)
    assert metrics == again


def test_self_supervised_exits_leave_the_model_alone(base: RunConfig, tmp_path: Path) -> None:
    config = changed(base, method="self_supervised_exits", steps=20, schedule="constant")
    exits = (ExitConfig(1, "norm", tied=True, init="random", gate=4),)
    model, params, metrics = fit(dataclasses.replace(config, exits=exits), tmp_path / "exits")
    assert model.exits == exits
    _, untouched, _ = fit(changed(base, steps=3, lr=1e-30, weight_decay=0.0, warmup=0), tmp_path / "same")
    chex.assert_trees_all_equal({k: v for k, v in params.items() if k != "exit_1"}, untouched)
    lines = [line for line in metric_lines(tmp_path / "exits") if "loss/exit_1" in line]
    assert lines[-1]["loss/exit_1"] < lines[0]["loss/exit_1"]
    assert {"agreement/exit_1", "gate_accuracy/exit_1"} <= set(metrics)


def test_cached_states_train_for_many_epochs_and_resume(base: RunConfig, tmp_path: Path, monkeypatch) -> None:
    config = changed(base, method="self_supervised_exits", cached_batches=2, steps=12, schedule="constant")
    config = dataclasses.replace(config, exits=(ExitConfig(1, "mlp", init="random"),))
    _, straight, metrics = fit(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stopped):
            fit(config, tmp_path / "stopped")
    _, resumed, again = fit(config, tmp_path / "stopped")
    chex.assert_trees_all_equal(straight, resumed)
    assert metrics == again
    lines = [line for line in metric_lines(tmp_path / "straight") if "loss/exit_1" in line]
    assert lines[-1]["loss/exit_1"] < lines[0]["loss/exit_1"]


def test_extracted_layers_are_fine_tuned_alone(base: RunConfig, tmp_path: Path) -> None:
    model, params, _ = fit(changed(base, init_layers=1), tmp_path / "small")
    assert model.n_layers == 1
    assert "layers_1" not in params
    with pytest.raises(ValueError, match=r"n=3: the model has 2 layers"):
        fit(changed(base, init_layers=3), tmp_path / "too_many")

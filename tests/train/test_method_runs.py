"""Whole runs of the methods that train nested sub-models or exits without labels."""

import dataclasses
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import Stopped, changed, metric_lines, stop_at

from elastic_lm.checkpoints.native import load_menu, load_model, save_model
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.data.batch import Batch
from elastic_lm.data.pipeline import train_batches
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.files.subnet_files import load_subnets
from elastic_lm.models.decoder import Params, unstack_layers
from elastic_lm.models.sharding import make_mesh
from elastic_lm.testing import all_logits
from elastic_lm.train.config import RunConfig
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.run import fit
from elastic_lm.train.state import create_state
from elastic_lm.train.text import prepare_text, prepare_tokenizer
from elastic_lm.width import ranking
from elastic_lm.width.importance import rank
from elastic_lm.width.slicing import slice_params


@pytest.fixture
def base(run_config: RunConfig, tmp_path: Path) -> RunConfig:
    """A run from a checkpoint of two layers."""
    fit(changed(run_config, steps=3, eval_every=0), tmp_path / "base")
    run = changed(run_config, init_from=str(tmp_path / "base" / "model"), eval_every=0)
    return dataclasses.replace(run, model=None)


@pytest.mark.long
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


@pytest.mark.long
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


ELASTIC = {
    "method": "flextron",
    "menu": Menu((0.25, 1.0), (0.5, 1.0)),
    "elastic_groups": 8,
    "rank_batches": 2,
}


@pytest.mark.long
def test_elastic_training_resumes_bit_identically(base: RunConfig, tmp_path: Path, monkeypatch) -> None:
    """With a frozen teacher, which is no part of what is saved; widths are ranked once."""
    config = changed(base, **ELASTIC, distil=0.5, teacher="frozen", steps=20, schedule="constant")
    config = changed(config, save_every=10)
    model, straight, metrics = fit(config, tmp_path / "straight")
    lines = [line for line in metric_lines(tmp_path / "straight") if "loss/sampled" in line]
    assert lines[-1]["loss/sampled"] < 0.9 * lines[0]["loss/sampled"]
    assert lines[-1]["loss/final"] < lines[0]["loss/final"]
    widths = {"loss/smallest", "loss/mlp_0.25_heads_1", "loss/mlp_1_heads_0.5", "loss/final"}
    assert set(metrics) == {*widths, "loss", "accuracy/final"}
    ranked = []
    plain = ranking.rank
    monkeypatch.setattr(ranking, "rank", lambda *args: ranked.append(1) or plain(*args))
    with monkeypatch.context() as patch:
        stop_at(patch, 15)
        with pytest.raises(Stopped):
            fit(config, tmp_path / "stopped")
    assert ranked == [1]
    same, resumed, again = fit(config, tmp_path / "stopped")
    assert ranked == [1]
    chex.assert_trees_all_equal(straight, resumed)
    assert (same, again) == (model, metrics)

    assert model.elastic_groups == 8
    assert load_menu(tmp_path / "stopped" / "model") == config.method.menu
    named = load_subnets(tmp_path / "stopped" / "model", model)
    assert set(named) == {"w25-h50", "w25", "h50", "whole"}
    assert named == load_subnets(tmp_path / "straight" / "model")
    loaded, params = load_model(tmp_path / "stopped" / "model")
    assert loaded == model
    chex.assert_trees_all_equal(params, resumed)
    small, cut = slice_params(loaded, params, Subnet.uniform(loaded, mlp=0.25, heads=0.5))
    assert (small.d_mlp, small.n_heads) == (16, 2)
    assert jnp.all(jnp.isfinite(all_logits(small, cut, np.arange(9)[None])[2]))


def batch(config: RunConfig, folder: Path) -> Batch:
    """The first batch of a run."""
    arrays = next(iter(train_batches(config.data, prepare_tokenizer(config, folder))))
    return Batch(**arrays)


def at_the_start(config: RunConfig, folder: Path) -> tuple[ModelConfig, Params, bool]:
    """(config and canonical parameters that a run begins with, whether it ranked them)."""
    run = prepare_text(config, folder, make_mesh())
    trainable, _ = run.method.split(run.params)
    before = create_state(make_optimizer(config.train), trainable)
    after = run.method.begin(before, {}, run.data)
    return run.method.config, unstack_layers(after.params), after is not before


def test_a_pretrained_model_is_ranked_once(base: RunConfig, tmp_path: Path) -> None:
    before, original = load_model(base.train.init_from)
    after, params, ranked = at_the_start(changed(base, **ELASTIC), tmp_path)
    assert ranked
    assert after == dataclasses.replace(before, elastic_groups=8)
    kernels = (tree["layers_0"]["mlp"]["up"]["kernel"] for tree in (original, params))
    assert not np.array_equal(*kernels)
    tokens = np.arange(9)[None]
    expected = all_logits(before, original, tokens)[2]
    np.testing.assert_allclose(all_logits(after, params, tokens)[2], expected, rtol=1e-4, atol=1e-5)
    mlp = rank(after, params, [batch(base, tmp_path)]).neurons["layers_0"].reshape(8, 8)
    assert np.mean(mlp[:, 0]) > np.mean(mlp[:, 3]) > np.mean(mlp[:, 7]), (
        "the best of every storage group first"
    )

    save_model(tmp_path / "elastic", after, params, Tokenizer.load(base.train.init_from))
    again = changed(base, **{**ELASTIC, "elastic_groups": 0}, init_from=str(tmp_path / "elastic"))
    same, kept, ranked = at_the_start(again, tmp_path)
    assert not ranked
    assert same == after
    chex.assert_trees_all_equal(kept, params)
    with pytest.raises(ValueError, match=r"method\.elastic_groups=4: the model has 8 already; set 0"):
        at_the_start(changed(again, elastic_groups=4), tmp_path)


def test_a_new_model_is_not_ranked(run_config: RunConfig, tmp_path: Path) -> None:
    config = changed(run_config, method="flextron", draw="one_per_step")
    model, _, ranked = at_the_start(config, tmp_path)
    assert model.elastic_groups == 16
    assert not ranked
    with pytest.raises(ValueError, match=r"elastic_groups=24: must divide d_mlp=64; choose 8"):
        at_the_start(changed(config, elastic_groups=24), tmp_path)
    with pytest.raises(
        ValueError, match=r"menu\.mlp=0\.3: must give a whole number of the 64 neurons; nearest: 0\.29"
    ):
        at_the_start(changed(config, menu=Menu((0.3, 1.0), (1.0,))), tmp_path)

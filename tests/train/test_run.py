"""A whole run: resume, metrics, divergence, tuning exits from a checkpoint."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from training_runs import Stopped, changed, metric_lines, stop_at

from elastic_lm import testing
from elastic_lm.checkpoints.native import load_model, save_model
from elastic_lm.config.model import ExitConfig
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.depth.ee_tuning import EETuning
from elastic_lm.models.sharding import make_mesh
from elastic_lm.train.config import RunConfig
from elastic_lm.train.pretraining import Pretraining
from elastic_lm.train.run import fit
from elastic_lm.train.text import prepare_model


def test_rerun_after_a_stop_is_bit_identical(run_config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    config = changed(run_config, eval_every=0)
    model, straight, _ = fit(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stopped):
            fit(config, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "model").exists()
    _, resumed, _ = fit(config, tmp_path / "stopped")
    chex.assert_trees_all_equal(straight, resumed)
    losses = [[r["loss"] for r in metric_lines(tmp_path / d) if "loss" in r] for d in ("straight", "stopped")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    loaded_config, loaded = load_model(tmp_path / "stopped" / "model")
    assert loaded_config == model
    chex.assert_trees_all_equal(loaded, resumed)


def test_rerun_of_a_finished_run_trains_no_further(run_config: RunConfig, tmp_path: Path) -> None:
    _, first, before = fit(run_config, tmp_path)
    _, again, after = fit(run_config, tmp_path)
    chex.assert_trees_all_equal(first, again)
    assert before == after


def test_loss_falls_and_is_reported(run_config: RunConfig, tmp_path: Path, capsys) -> None:
    _, _, metrics = fit(changed(run_config, steps=40, eval_every=20, save_every=40), tmp_path)
    lines = metric_lines(tmp_path)
    assert [r["step"] for r in lines if "eval_loss" in r] == [20, 40]
    assert metrics["loss"] < 0.7 * lines[0]["loss"]
    output = capsys.readouterr().out
    assert "step 40/40" in output
    assert "tokens_per_s" in output


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(
    run_config: RunConfig, tmp_path: Path, monkeypatch
) -> None:
    config = changed(run_config, eval_every=0)
    plain = Pretraining.loss

    def poisoned(self, trainable, frozen, batch, step):
        loss, metrics = plain(self, trainable, frozen, batch, step)
        loss = jnp.where(step == 3, jnp.nan, loss)  # the fourth step
        return loss, {**metrics, "loss": loss}

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "loss", poisoned)
        with pytest.raises(FloatingPointError, match="step 4"):
            fit(config, tmp_path)
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [2]
    _, params, _ = fit(config, tmp_path)
    chex.assert_tree_all_finite(params)


def test_an_update_that_breaks_the_parameters_is_not_saved(run_config: RunConfig, tmp_path: Path) -> None:
    config = changed(run_config, steps=1, warmup=0, lr=1e39, clip=0.0, schedule="constant", eval_every=0)
    with pytest.raises(FloatingPointError, match="parameters are not finite after step 1"):
        fit(config, tmp_path)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert not (tmp_path / "model").exists()


def test_text_without_a_token_to_learn_is_refused(run_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 3)
    paths = (str(tmp_path / "empty.jsonl"),)
    _, _, _ = fit(changed(run_config, steps=3), tmp_path / "base")
    data = dataclasses.replace(run_config.data, source="jsonl", paths=paths, tokenizer=str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"data\.paths=.*empty\.jsonl.*none of 3 documents"):
        fit(dataclasses.replace(run_config, data=data), tmp_path / "run")


def test_a_run_from_before_a_field_existed_resumes(run_config: RunConfig, tmp_path: Path) -> None:
    fit(changed(run_config, steps=3), tmp_path)
    values = json.loads((tmp_path / "run.json").read_text())
    del values["train"]["optimizer"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    fit(changed(run_config, steps=4), tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json: does not describe a run"):
        fit(changed(run_config, steps=4), tmp_path)


def test_exits_of_a_checkpoint_are_not_pretrained(run_config: RunConfig, tmp_path: Path) -> None:
    joint = changed(run_config, method="joint", steps=3)
    fit(dataclasses.replace(joint, exits=(ExitConfig(1, "norm"),)), tmp_path / "base")
    again = changed(run_config, steps=3, init_from=str(tmp_path / "base" / "model"))
    with pytest.raises(ValueError, match=r"method\.name='pretraining': .* has exits"):
        fit(dataclasses.replace(again, model=None), tmp_path / "again")


def test_exits_are_tuned_on_a_frozen_checkpoint(
    run_config: RunConfig, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(EETuning, "remark", lambda self, metrics: f"starts at {metrics['loss/exit_1']}")
    _, backbone, _ = fit(run_config, tmp_path / "base")
    tuning = changed(run_config, method="ee_tuning", init_from=str(tmp_path / "base" / "model"), steps=20)
    tuning = dataclasses.replace(tuning, model=None, exits=(ExitConfig(1),))
    model, params, metrics = fit(tuning, tmp_path / "exits")
    assert [e.layer for e in model.exits] == [1]
    chex.assert_trees_all_equal({name: params[name] for name in backbone}, backbone)
    assert any("exit_1" in name for name in metrics)
    remarks = [message for message in caplog.messages if message.startswith("starts at")]
    first = metric_lines(tmp_path / "exits")[0]["loss/exit_1"]
    assert [float(remark.split()[-1]) for remark in remarks] == [pytest.approx(first, rel=1e-4)]
    saved = tmp_path / "exits" / "model"
    assert load_model(saved)[0] == model
    assert Tokenizer.load(saved).vocab_size == 300


def test_a_tokenizer_that_is_too_large_is_refused(run_config: RunConfig, tmp_path: Path) -> None:
    fit(changed(run_config, steps=3), tmp_path / "base")
    data = dataclasses.replace(run_config.data, tokenizer=str(tmp_path / "base"))
    assert run_config.model is not None
    small = dataclasses.replace(run_config.model, vocab_size=299)
    with pytest.raises(ValueError, match="vocab_size=299"):
        fit(dataclasses.replace(run_config, model=small, data=data), tmp_path / "small")


def test_tokens_that_a_loaded_model_has_no_row_for_are_no_obstacle(
    run_config: RunConfig, tmp_path: Path
) -> None:
    tokenizer = train_bpe(["some text"], 300)
    config = testing.tiny_config(n_layers=2, vocab_size=tokenizer.vocab_size)
    tokenizer.backend.add_tokens(["<pad>"])
    save_model(tmp_path / "base", config, testing.random_params(config), tokenizer)
    train = dataclasses.replace(run_config.train, init_from=str(tmp_path / "base"))
    run = dataclasses.replace(run_config, model=None, train=train)
    model, _, weights = prepare_model(run, Tokenizer.load(tmp_path / "base"), make_mesh())
    assert model.vocab_size == tokenizer.vocab_size - 1
    assert len(weights) == 16


def test_a_checkpoint_of_another_model_is_refused(run_config: RunConfig, tmp_path: Path) -> None:
    fit(run_config, tmp_path)
    assert run_config.model is not None
    wider = dataclasses.replace(run_config.model, d_mlp=128)
    other = dataclasses.replace(run_config, model=wider)
    with pytest.raises(ValueError, match=r"run\.json: .*model\.d_mlp=64, not 128"):
        fit(other, tmp_path)
    (tmp_path / "run.json").unlink()  # as an older version left it
    with pytest.raises(ValueError, match="checkpoints"):
        fit(other, tmp_path)


def test_a_damaged_checkpoint_is_skipped(run_config: RunConfig, tmp_path: Path) -> None:
    config = changed(run_config, eval_every=0)
    _, straight, _ = fit(config, tmp_path)
    newest = tmp_path / "checkpoints" / "6"
    for file in [p for p in newest.rglob("*") if p.is_file() and "/d/" in str(p)]:
        file.write_bytes(file.read_bytes()[:10])
    _, again, _ = fit(config, tmp_path)
    chex.assert_trees_all_equal(straight, again)


def test_weights_are_drawn_from_the_seed(run_config: RunConfig, tmp_path: Path) -> None:
    _, one, _ = fit(changed(run_config, steps=3, seed=1), tmp_path / "one")
    _, two, _ = fit(changed(run_config, steps=3, seed=2), tmp_path / "two")
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, two))


def test_bfloat16_activations_train_float32_parameters(run_config: RunConfig, tmp_path: Path) -> None:
    model, params, metrics = fit(changed(run_config, steps=20, dtype="bfloat16"), tmp_path)
    assert model.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert metrics["loss"] < 5.0


def test_joint_training_moves_the_model_and_its_exits(run_config: RunConfig, tmp_path: Path) -> None:
    config = changed(run_config, method="joint", weights=(0.3,), steps=20)
    _, params, metrics = fit(dataclasses.replace(config, exits=(ExitConfig(1, "norm"),)), tmp_path)
    assert metrics["loss/exit_1"] < 5.5
    assert metrics["loss/final"] < 5.5
    assert "head" in params["exit_1"]


def test_rows_longer_than_the_model_are_refused(run_config: RunConfig, tmp_path: Path) -> None:
    data = dataclasses.replace(run_config.data, seq_len=65)
    with pytest.raises(ValueError, match=r"data\.seq_len=65: above model\.max_len=64"):
        fit(dataclasses.replace(run_config, data=data), tmp_path)


@pytest.mark.parametrize("workdir", ["hdfs://bucket/run", Path("hdfs://bucket/run")])
def test_remote_folders_of_another_kind_are_refused(run_config: RunConfig, workdir: str | Path) -> None:
    with pytest.raises(ValueError, match="remote paths of this kind are not supported"):
        fit(run_config, workdir)

"""Models made of the checkpoints of a run, which need not have ended."""

import dataclasses
from pathlib import Path

import chex
import pytest
from training_runs import changed

import elastic_lm as el
from elastic_lm.cli.main import main
from elastic_lm.config.model import ExitConfig
from elastic_lm.train.config import RunConfig
from elastic_lm.train.run import fit


@pytest.mark.long
def test_the_last_step_is_the_model_that_the_run_left(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = tmp_path / "base", tmp_path / "exits"
    fit(run_config, base)
    options = {"init_from": str(base / "model"), "steps": 2, "warmup": 1, "eval_every": 0}
    config = changed(run_config, method="ee_tuning", **options)
    config = dataclasses.replace(config, model=None, exits=(ExitConfig(1, kind="norm"),))
    model, params, _ = fit(config, run)

    step, whole, layers = run / "checkpoints" / "2", tmp_path / "whole", tmp_path / "layers"
    assert main(["convert", "--from", str(step), "--to", str(whole)]) == 0
    loaded, found = el.load(whole)
    assert loaded.config == model
    chex.assert_trees_all_equal(found, params)
    assert el.Tokenizer.load(whole).vocab_size == el.Tokenizer.load(run / "model").vocab_size

    assert main(["convert", "--from", str(step), "--to", str(layers), "--backbone"]) == 0
    backbone, found = el.load(layers)
    assert backbone.config.exits == ()
    chex.assert_trees_all_equal(found, el.load(base / "model")[1])

    capsys.readouterr()
    assert main(["convert", "--from", str(base / "model"), "--to", str(whole), "--backbone"]) == 2
    assert "--backbone" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="make a model of it with elastic-lm convert --from"):
        el.load(step)

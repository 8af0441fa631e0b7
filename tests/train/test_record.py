"""What a run saves so that it can be repeated, what it prints and logs, and the one seed of it."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import chex
import jax
import pytest
from training_runs import changed, metric_lines

from elastic_lm import __version__, testing
from elastic_lm.checkpoints.native import load_model, save_model
from elastic_lm.cli import main as cli
from elastic_lm.config.log import LogConfig
from elastic_lm.config.model import ExitConfig
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.train.config import RunConfig, with_seeds
from elastic_lm.train.optim import learning_rate
from elastic_lm.train.recipes import load_config
from elastic_lm.train.record import CONFIG_FILE, GIN_FILE, STARTS_FILE, commit
from elastic_lm.train.run import fit

RECIPE = """
from ml_collections import ConfigDict


def get_config(arg=""):
    c = ConfigDict()
    c.model = {"vocab_size": 300, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 16, "max_len": 64}
    c.exits = [{"layer": 1, "kind": "norm"}]
    c.data = {"source": "text", "paths": ("TEXT",), "eval_paths": ("TEXT",), "seq_len": 32, "batch_size": 2}
    c.method = {"name": "joint", "weights": (0.5,)}
    c.train = {"steps": 20, "lr": 1e-2, "log_every": 1, "eval_batches": 2}
    c.train.warmup = c.train.get_ref("steps") // 4
    c.seed = 3
    return c
"""
GIN = """
RunConfig.model = @ModelConfig()
RunConfig.exits = (@ExitConfig(),)
RunConfig.method = @JointTrainingConfig()
RunConfig.seed = 3
ModelConfig.vocab_size = 300
ModelConfig.d_model = 16
ModelConfig.n_layers = 2
ModelConfig.n_heads = 2
ModelConfig.d_mlp = 16
ModelConfig.max_len = 64
ExitConfig.layer = 1
ExitConfig.kind = "norm"
DataConfig.source = "text"
DataConfig.paths = ("TEXT",)
DataConfig.eval_paths = ("TEXT",)
DataConfig.seq_len = 32
DataConfig.batch_size = 2
JointTrainingConfig.weights = (0.5,)
TrainConfig.steps = 20
TrainConfig.warmup = 5
TrainConfig.lr = 1e-2
TrainConfig.log_every = 1
TrainConfig.eval_batches = 2
"""
CHANGING = ("tokens_per_s", "tokens_per_s_per_chip", "step_seconds", "peak_memory_gib")


@pytest.fixture
def recipes(tmp_path: Path, text_file: Path) -> Path:
    (tmp_path / "run.py").write_text(RECIPE.replace("TEXT", str(text_file)))
    (tmp_path / "run.gin").write_text(GIN.replace("TEXT", str(text_file)))
    return tmp_path


def train(flags: str) -> None:
    assert cli.main(["train", *shlex.split(flags)]) == 0


def numbers(workdir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in CHANGING} for line in metric_lines(workdir)]


@pytest.mark.long
def test_gin_and_ml_collections_give_the_same_run_bit_for_bit_and_its_config_repeats_it(
    recipes: Path,
) -> None:
    """The values of both are changed on the command line, and the reference follows."""
    pytest.importorskip("gin", reason="gin-config is not installed")
    here = recipes
    train(f"--config {here}/run.py --config.train.steps 8 --config.exits[0].kind=mlp --workdir {here}/py")
    params = "--gin_param TrainConfig.steps=8 --gin_param TrainConfig.warmup=2"
    params += " --gin_param 'ExitConfig.kind=\"mlp\"'"
    train(f"--gin_file {here}/run.gin {params} --workdir {here}/gin")
    train(f"--config {here}/py/{CONFIG_FILE} --workdir {here}/again")
    train(f"--gin_file {here}/gin/{GIN_FILE} --workdir {here}/operative")

    model, expected = load_model(here / "py" / "model")
    assert model.exits[0].kind == "mlp"
    assert len(numbers(here / "py")) == 9
    for name in ("gin", "again", "operative"):
        other, params = load_model(here / name / "model")
        assert other == model
        chex.assert_trees_all_equal(params, expected)
        assert numbers(here / name) == numbers(here / "py")
        assert (here / name / CONFIG_FILE).read_text() == (here / "py" / CONFIG_FILE).read_text()
    assert not (here / "py" / GIN_FILE).exists()


def test_every_start_is_recorded_and_what_a_step_takes_is_logged(
    run_config: RunConfig, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/lib/elastic_lm/__main__.py", "train", "--config", "my config.py"])
    config = changed(run_config, eval_every=0)
    _, params, _ = fit(changed(config, steps=3), tmp_path)
    printed = capsys.readouterr().out
    _, _, _ = fit(config, tmp_path)

    starts = [json.loads(line) for line in (tmp_path / STARTS_FILE).read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 3]
    for start in starts:
        assert start["elastic_lm"] == __version__
        assert start["versions"]["jax"] == jax.__version__
        assert start["mesh"] == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
        assert len(start["hardware"]["devices"]) == jax.device_count()
        assert start["command"] == "elastic-lm train --config 'my config.py'"
        assert start["git"] is None
    assert load_config(str(tmp_path / CONFIG_FILE)) == config

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"{count:,} of {count:,} parameters train on {jax.device_count()} x " in printed
    assert "mesh: data " in printed
    assert printed.index("compiling") < printed.index("step 1/3")
    assert "step_seconds" in printed
    assert ("tokens_per_s_per_chip" in printed) == (jax.device_count() > 1)

    lines = [line for line in metric_lines(tmp_path) if "loss" in line]
    rates = [learning_rate(changed(config, steps=steps).train) for steps in (3, 6)]
    expected = [float(rates[step >= 3](step)) for step in range(6)]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-5)
    assert lines[0]["lr"] == 0 < lines[1]["lr"]
    tokens = config.data.batch_size * config.data.seq_len
    for line in lines:
        assert line["step_seconds"] * line["tokens_per_s"] == pytest.approx(tokens, rel=1e-3)
        assert 0.05 < line["peak_memory_gib"] < 1000
        assert line["tokens_per_s_per_chip"] * jax.device_count() == pytest.approx(
            line["tokens_per_s"], rel=1e-3
        )
        assert "mfu" not in line  # nobody publishes a peak of CPUs


def test_the_commit_of_a_folder_and_whether_it_changed(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "recipe.py").write_text("STEPS = 1\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    found = commit(tmp_path)
    assert found is not None
    assert len(found["commit"]) == 40
    assert not found["changed"]
    (tmp_path / "recipe.py").write_text("STEPS = 2\n")
    assert commit(tmp_path) == {**found, "changed": True}


def tuning(run_config: RunConfig, folder: Path) -> RunConfig:
    """Copied exits, which draw nothing, on a model that is saved in `folder`."""
    tokenizer = train_bpe(["def f(x): return x"] * 3, 300)
    model = testing.tiny_config(n_layers=2, vocab_size=300, max_len=64)
    save_model(folder, model, testing.random_params(model), tokenizer)
    tuned = changed(run_config, method="ee_tuning", init_from=str(folder), steps=3, eval_every=0)
    return dataclasses.replace(tuned, model=None, exits=(ExitConfig(1, "norm", init="copy"),))


def test_another_seed_is_another_run_of_copied_exits_too(run_config: RunConfig, tmp_path: Path) -> None:
    run = tuning(run_config, tmp_path / "base")
    for name, config in {
        "0": changed(run, seed=0),
        "1": changed(run, seed=1),
        "one": dataclasses.replace(run, seed=1),
        "apart": dataclasses.replace(changed(run, seed=1), data=dataclasses.replace(run.data, seed=0)),
    }.items():
        fit(config, tmp_path / name)
    losses = {
        name: [line["loss"] for line in numbers(tmp_path / name) if "loss" in line] for name in ("0", "1")
    }
    assert losses["0"] != losses["1"]
    assert numbers(tmp_path / "one") == numbers(tmp_path / "1")
    assert numbers(tmp_path / "apart") == numbers(tmp_path / "0")  # nothing but the order of the data differs


def test_seeds_follow_one_another_unless_set_apart(run_config: RunConfig) -> None:
    def seeds(**own: int | None) -> tuple[int | None, int | None]:
        train = dataclasses.replace(run_config.train, seed=own.get("train"))
        data = dataclasses.replace(run_config.data, seed=own.get("data"))
        run = with_seeds(dataclasses.replace(run_config, train=train, data=data, seed=own.get("run", 0)))
        return run.train.seed, run.data.seed

    assert seeds() == (0, 0)
    assert seeds(run=5) == (5, 5)
    assert seeds(run=5, train=6) == (6, 6)
    assert seeds(run=5, data=7) == (5, 7)
    assert seeds(run=5, train=6, data=7) == (6, 7)


def test_a_run_may_go_on_with_other_writers_and_its_seed_written_elsewhere(
    run_config: RunConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(changed(run_config, steps=3, eval_every=0), seed=2)
    fit(config, tmp_path)
    moved = dataclasses.replace(changed(config, seed=2, steps=4), seed=0, log=LogConfig(writers=("jsonl",)))
    fit(moved, tmp_path)
    with pytest.raises(ValueError, match=r"run\.json: the run there has train\.seed=2, not 3"):
        fit(dataclasses.replace(config, seed=3), tmp_path)

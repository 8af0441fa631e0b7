"""Sweeps: which runs there are, that each is the run it would be alone, failures, resuming, and the table."""

import dataclasses
import json
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path

import chex
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from training_runs import changed

from elastic_lm.checkpoints.native import load_model
from elastic_lm.cli import main as cli
from elastic_lm.train import sweeps
from elastic_lm.train.config import RunConfig
from elastic_lm.train.loop import Stopped
from elastic_lm.train.record import Origin
from elastic_lm.train.run import fit
from elastic_lm.train.sweeps import Outcome, make_members, run_sweep, table, table_lines, values_of

RECIPE = """
def get_config(arg=""):
    return {
        "model": {"vocab_size": 300, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 16, "max_len": 64},
        "data": {"source": "text", "paths": ["TEXT"], "eval_paths": ["TEXT"], "seq_len": 32, "batch_size": 2},
        "train": {"steps": 3, "warmup": 1, "eval_batches": 2},
    }
"""


@pytest.fixture
def recipe(tmp_path: Path, text_file: Path) -> Path:
    path = tmp_path / "run.py"
    path.write_text(RECIPE.replace("TEXT", str(text_file)))
    return path


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["train.seed=0,1,2"], {"train.seed": ["0", "1", "2"]}),
        (["a=1", "b = x , y"], {"a": ["1"], "b": ["x", "y"]}),
        (["method.weights=(1.0,0.5),(0.5,1.0)"], {"method.weights": ["(1.0,0.5)", "(0.5,1.0)"]}),
        (["data.paths='a,b',c"], {"data.paths": ["'a,b'", "c"]}),
        (["DataConfig.paths=('a',),('b',)"], {"DataConfig.paths": ["('a',)", "('b',)"]}),
    ],
)
def test_values_are_between_commas_outside_of_brackets(texts: list[str], values: dict) -> None:
    assert values_of(texts) == values


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["train.seed"], r"--sweep='train\.seed': write KEY=VALUE,VALUE like train\.seed=0,1,2"),
        (["train.seed="], r"write KEY=VALUE"),
        (["=1,2"], r"write KEY=VALUE"),
        (["a=1,,2"], r"write KEY=VALUE"),
        (["a=1,2,1"], r"names 1 twice; name each value once"),
        (["a=1", "a=2"], r"the key is swept over already; name it once"),
    ],
)
def test_what_is_no_sweep_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        values_of(texts)


def members_of(run: RunConfig, *texts: str) -> list[sweeps.Member]:
    def load(values: Mapping[str, str]) -> tuple[RunConfig, Origin]:
        options = {key.removeprefix("train."): float(text) for key, text in values.items()}
        seed = int(options.pop("seed", 0))
        return changed(run, seed=seed, **options), Origin()

    return make_members(texts, load)


def test_several_sweeps_make_every_combination_in_folders_of_their_own(run_config: RunConfig) -> None:
    members = members_of(run_config, "train.lr=0.1,0.2", "train.seed=0,1,2")
    assert [member.name for member in members][:4] == [
        "train.lr=0.1,train.seed=0",
        "train.lr=0.1,train.seed=1",
        "train.lr=0.1,train.seed=2",
        "train.lr=0.2,train.seed=0",
    ]
    assert len({member.config for member in members}) == 6


def test_folders_that_would_have_one_name_are_told_apart(run_config: RunConfig) -> None:
    def names(sweep: str) -> list[str]:
        return [member.name for member in make_members([sweep], lambda _: (run_config, Origin()))]

    slash, colon, plain = names("data.paths=a/b,a:b,c")
    assert slash.startswith("data.paths=a_b-")
    assert colon.startswith("data.paths=a_b-")
    assert slash != colon
    assert plain == "data.paths=c"
    assert names("data.paths=c,a:b") == [plain, colon]  # other values leave a run its folder


def test_the_table_has_mean_and_spread_over_seeds(run_config: RunConfig) -> None:
    members = members_of(run_config, "train.lr=0.1,0.2", "train.seed=0,1,2")
    outcomes = {member.name: Outcome({"loss": float(i**2)}) for i, member in enumerate(members)}
    outcomes[members[5].name] = Outcome({}, "diverged")
    rows = table(members, outcomes)
    assert [(row["values"], row["runs"]) for row in rows] == [
        ({"train.lr": "0.1"}, 3),
        ({"train.lr": "0.2"}, 2),
    ]
    assert rows[0]["metrics"]["loss"]["mean"] == pytest.approx(5 / 3)
    assert rows[0]["metrics"]["loss"]["sd"] == pytest.approx(statistics.stdev([0, 1, 4]))
    assert rows[1]["metrics"]["loss"]["mean"] == pytest.approx(12.5)
    assert table_lines(rows) == [
        "train.lr=0.1  (3 runs)",
        "  loss  1.6667 ± 2.1",
        "train.lr=0.2  (2 runs)",
        "  loss  12.5 ± 4.9",
    ]
    (alone,) = table(members_of(run_config, "train.seed=4"), {"train.seed=4": Outcome({"loss": 1.0})})
    assert alone["metrics"]["loss"] == {"mean": 1.0, "sd": None}
    assert table_lines([alone]) == ["all  (1 run)", "  loss  1"]
    assert table_lines(table(members_of(run_config, "train.seed=4"), {})) == []


@pytest.mark.long
def test_a_run_of_a_sweep_is_the_run_that_it_would_be_alone_and_is_not_trained_again(
    recipe: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    command = f"train --config {recipe} --sweep train.seed=0,1 --workdir {tmp_path}/sweep"
    assert cli.main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    assert "run 2 of 2, train.seed=1:" in printed
    assert "all  (2 runs)" in printed
    assert "2 of 2 runs done" in printed

    alone = f"train --config {recipe} --config.train.seed=1 --workdir {tmp_path}/alone"
    assert cli.main(shlex.split(alone)) == 0
    model, params = load_model(tmp_path / "alone" / "model")
    other, swept = load_model(tmp_path / "sweep" / "train.seed=1" / "model")
    assert other == model
    chex.assert_trees_all_equal(swept, params)

    saved = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    losses = [run["metrics"]["loss"] for run in saved["runs"]]
    assert len(set(losses)) == 2
    assert saved["table"][0]["metrics"]["loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert saved["table"][0]["metrics"]["loss"]["sd"] == pytest.approx(statistics.stdev(losses))

    trained = []
    monkeypatch.setattr(
        sweeps,
        "fit",
        lambda config, folder, **more: trained.append(folder.name) or fit(config, folder, **more),
    )
    more = command.replace("0,1", "0,1,2")
    assert cli.main(shlex.split(more)) == 0
    assert trained == ["train.seed=2"]
    assert "run 1 of 3, train.seed=0: done before" in capsys.readouterr().out
    trained.clear()
    longer = command.replace("0,1", "0") + " --config.train.steps=4"
    assert cli.main(shlex.split(longer)) == 0  # of another config, so it goes on
    assert trained == ["train.seed=0"]


def test_a_run_that_fails_does_not_lose_the_others(recipe: Path, tmp_path: Path, capsys) -> None:
    command = f"train --config {recipe} --sweep train.lr=1e-3,1e30 --workdir {tmp_path}/sweep"
    command += " --config.train.warmup=0 --config.train.clip=0.0 --config.train.schedule=constant"
    command += " --config.train.log_every=1"
    assert cli.main(shlex.split(command)) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 runs done; failed: train.lr=1e30" in printed
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["done", "failed"]
    assert "step" in runs[1]["error"]
    assert (tmp_path / "sweep" / "train.lr=1e-3" / "model").is_dir()


def test_a_value_that_is_refused_stops_the_sweep_before_it_begins(
    recipe: Path, tmp_path: Path, capsys
) -> None:
    command = f"train --config {recipe} --sweep train.steps=3,0 --workdir {tmp_path}/sweep"
    assert cli.main(shlex.split(command)) == 2
    assert "train.steps=0: must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_that_is_stopped_goes_on(run_config: RunConfig, tmp_path: Path) -> None:
    members = members_of(changed(run_config, steps=3, eval_every=0), "train.seed=0,1")
    asked = iter([False, False, False, True])
    with pytest.raises(Stopped):
        run_sweep(members, tmp_path, stop=lambda: next(asked), say=lambda _: None)
    runs = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["done", "waiting"]
    outcomes = run_sweep(members, tmp_path, say=lambda _: None)
    assert all(outcome.metrics for outcome in outcomes.values())


def test_the_folder_of_a_single_run_is_refused(run_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a single run; choose another for the sweep"):
        run_sweep(members_of(run_config, "train.seed=0"), tmp_path)


@pytest.mark.parametrize("chosen", ["off", "folder"])
def test_compiled_programs_are_kept_where_those_of_commands_are(
    chosen: str, tmp_path: Path, monkeypatch
) -> None:
    option = "jax_compilation_cache_dir"
    before = getattr(jax.config, option)
    monkeypatch.setenv("ELASTIC_LM_CACHE", chosen if chosen == "off" else str(tmp_path / chosen))
    try:
        jax.config.update(option, None)
        run_sweep([], tmp_path / "sweep")
        kept = getattr(jax.config, option)
        assert kept is None if chosen == "off" else Path(kept).parent == tmp_path / chosen

        jax.config.update(option, str(tmp_path))
        run_sweep([], tmp_path / "sweep")
        assert getattr(jax.config, option) == str(tmp_path)
    finally:
        jax.config.update(option, before)
        compilation_cache.reset_cache()


def test_gin_bindings_are_swept_over(text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("gin", reason="gin-config is not installed")
    from elastic_lm.cli.train import Options, load

    options = Options(
        workdir="w", gin_param=("TrainConfig.init_from='m'",), sweep=("TrainConfig.lr=0.1,0.2",)
    )
    members = make_members(options.sweep, lambda values: load(options, values))
    assert [member.config.train.lr for member in members] == [0.1, 0.2]
    assert "TrainConfig.lr = 0.2" in members[1].origin.operative_gin
    assert dataclasses.is_dataclass(members[0].config)

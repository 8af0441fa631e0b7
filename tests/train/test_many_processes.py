"""Real processes on the loopback interface: what they train, measure and write is what one process does."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from many_processes import CHILD, together
from test_task_runs import ENCODER, write_records, write_tokenizer
from training_runs import changed, metric_lines

from elastic_lm import hf
from elastic_lm.checkpoints.loading import load
from elastic_lm.checkpoints.native import save_model
from elastic_lm.cli import main as cli
from elastic_lm.config.mesh import MeshConfig
from elastic_lm.config.model import ExitConfig
from elastic_lm.config.parse import to_dict
from elastic_lm.config.subnet import Menu
from elastic_lm.config.task import TaskConfig
from elastic_lm.data import labelled
from elastic_lm.data.pipeline import train_batches
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.models.decoder import unstack_layers
from elastic_lm.models.exits import attach_exits
from elastic_lm.testing import random_params
from elastic_lm.train import run as train_run
from elastic_lm.train.config import RunConfig, TaskRun, TrainConfig
from elastic_lm.train.run import fit
from elastic_lm.train.state import create_state
from elastic_lm.width.trained_routers import Routers

STEPS = 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Adam divides by the root of squared gradients. Where these are 0 but for rounding, its own eps of 1e-8 would
# make steps of the whole learning rate of them.
TRAIN = {
    "steps": STEPS,
    "warmup": 1,
    "eps": 1e-3,
    "lr": 1e-3,
    "eval_every": 0,
    "eval_batches": 2,
    "save_every": STEPS,
}


@pytest.fixture
def runs(run_config: RunConfig, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """One run of every kind of method, from the same model of random weights."""
    assert run_config.model is not None
    tokenizer = train_bpe([text_file.read_text()], run_config.model.vocab_size)
    small = dataclasses.replace(run_config.model, eos_ids=tokenizer.eos_ids)
    params = random_params(small, scale=0.1)
    save_model(tmp_path / "base", small, params, tokenizer)
    elastic = dataclasses.replace(small, elastic_groups=8)
    save_model(tmp_path / "elastic", elastic, params, tokenizer, menu=Menu((0.5, 1.0), (0.5, 1.0)))

    run = changed(run_config, init_from=str(tmp_path / "base"), **TRAIN)
    run = dataclasses.replace(run, model=None)
    exits = (ExitConfig(1, "mlp", init="random"),)

    def with_exits(method: str, **options: Any) -> RunConfig:
        return dataclasses.replace(changed(run, method, **options), exits=exits)

    shards = dataclasses.replace(run.data, shards=4)
    menu = {"menu": Menu((0.5, 1.0), (0.5, 1.0)), "elastic_groups": 8, "rank_batches": 2}
    routed = {"router_width": 16, "budgets": (0.75, 0.9, 1.0), "init_from": str(tmp_path / "elastic")}

    task = TaskConfig(
        paths=(str(write_records(tmp_path / "train.jsonl", 300, 0)),),
        eval_paths=(str(write_records(tmp_path / "dev.jsonl", 21, 1)),),  # the last batch is not full
        text_field="review",
        pair_field="again",
        max_len=32,
        batch_size=8,
        tokenizer=str(write_tokenizer(tmp_path)),
    )
    return {
        "ee_tuning": dataclasses.replace(with_exits("ee_tuning"), data=shards),
        "cached": with_exits("self_supervised_exits", cached_batches=2),
        "soft": changed(run, "sorted_finetuning"),
        "flextron": changed(run, "flextron", **menu),
        "routers": changed(run, "routers", **routed),
        "task": TaskRun(task, TrainConfig(log_every=1, **TRAIN), encoder=ENCODER),
    }


def written(runs: dict[str, Any], folder: Path, workdirs: str) -> list[Any]:
    """The runs as jobs of `one_of_many`."""
    jobs = []
    for name, run in runs.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(to_dict(run)))
        jobs.append(["train", [str(file), str(folder / workdirs / name)]])
    return jobs


def do(jobs: Sequence[Any], folder: Path, count: int, devices: int = 1) -> list[str]:
    """Has several processes do jobs; what each printed."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    results = together([[CHILD, str(file)]] * count, devices=devices)
    for result in results:
        assert result.returncode == 0, "\n".join(r.stderr[-3000:] for r in results)
    return [result.stdout for result in results]


def first_rows(run: Any, count: int) -> list[np.ndarray]:
    """The tokens of the first batches that one process reads."""
    if isinstance(run, RunConfig):
        batches: Any = train_batches(run.data, Tokenizer.load(run.train.init_from))
    else:
        tokenizer = Tokenizer.load(run.task.tokenizer)
        labels = labelled.classes(run.task)
        batches = labelled.train_batches(run.task, tokenizer, labels, ENCODER.pad_id)
    return [batch["tokens"] for batch, _ in zip(batches, range(count), strict=False)]


def check_run(name: str, run: Any, folder: Path, count: int, devices: int = 1) -> None:
    """A run of several processes, in folder/many, against the same run of this one."""
    one, many = folder / "one" / name, folder / "many" / name
    begun: list[Any] = []

    def noting(optimizer: Any, trainable: Any, *rest: Any) -> Any:
        begun.append(jax.device_get(trainable))
        return create_state(optimizer, trainable, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_run, "create_state", noting)
        _, params, _ = fit(dataclasses.replace(run, mesh=MeshConfig()), one)

    # Each process reads the rows of its devices, and those of one are all of them.
    sharing = run.mesh.sequence * run.mesh.tensor
    kept = [np.load(f"{many}.rows{i}.npz") for i in range(count)]
    due = first_rows(run, 2 if name == "cached" else STEPS)
    if name == "flextron":  # ranks neurons on the first batches before it trains on them
        due = [*due[: run.method.rank_batches], *due]
    for i, tokens in enumerate(due):
        parts = np.split(tokens, count * devices // sharing)
        for process, rows in enumerate(kept):
            own = sorted({(process * devices + device) // sharing for device in range(devices)})
            np.testing.assert_array_equal(rows[f"arr_{i}"], np.concatenate([parts[part] for part in own]))

    # The same losses and gradients, written once.
    keys = ("loss", "grad_norm", "eval_loss", "step")
    losses = [
        [{k: line[k] for k in keys if k in line} for line in metric_lines(dir_)] for dir_ in (one, many)
    ]
    assert len(losses[0]) == STEPS + 1
    chex.assert_trees_all_close(losses[1], losses[0], **CLOSE)

    _, found = load(many / "model")
    params = jax.device_get(params)
    chex.assert_trees_all_close(found, params, **CLOSE)
    if name != "routers":  # which lie beside the parameters
        check_moves(begun[0], params, found)
    for file in ("inputs.json", "run.json"):
        assert json.loads((many / file).read_text()) == json.loads((one / file).read_text())


def check_moves(begun: Any, params: Any, found: Any) -> None:
    """What trained has moved alike, also where it moved less than the parameters may differ."""
    if "layers" in begun:
        begun = unstack_layers(begun)
    before, one, many = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (begun, params, found))
    trained = [path for path in before if path in one and before[path].shape == one[path].shape]
    assert trained
    moves = {}
    for path in trained:
        moves[path] = moved = float(np.abs(one[path] - before[path]).max())
        rounding = 1e-7 + 4e-7 * float(np.abs(one[path]).max())
        assert np.abs(many[path] - one[path]).max() <= 0.02 * moved + rounding, path
    assert max(moves.values()) > 1e-5, moves


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")
@pytest.mark.long
def test_two_processes_train_as_one(runs: dict[str, Any], tmp_path: Path) -> None:
    runs = {"ee_tuning": runs["ee_tuning"]}
    printed = do(written(runs, tmp_path, "many"), tmp_path, 2)
    assert "parameters train on 2 x" in printed[0]
    assert "parameters train on" not in printed[1]
    check_run("ee_tuning", runs["ee_tuning"], tmp_path, 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        pytest.param(2, 2, MeshConfig(data=2, fsdp=2), id="two"),
        pytest.param(4, 1, MeshConfig(data=2, tensor=2), id="four", marks=pytest.mark.nightly),
    ],
)
def test_several_processes_train_as_one(
    runs: dict[str, Any], tmp_path: Path, count: int, devices: int, mesh: MeshConfig
) -> None:
    """Rows and parameters are spread over processes; with tensor=2, two processes have the same rows."""
    spread = {name: dataclasses.replace(run, mesh=mesh) for name, run in runs.items()}
    do(written(spread, tmp_path, "many"), tmp_path, count, devices)
    for name, run in spread.items():
        check_run(name, run, tmp_path, count, devices)

    model, _ = load(tmp_path / "one" / "routers" / "model")
    routers = [
        Routers.load(tmp_path / side / "routers" / "model", model.config).params for side in ("one", "many")
    ]
    chex.assert_trees_all_close(*routers, **CLOSE)
    do([["meshes", [str(tmp_path / "many" / "flextron" / "model")]]], tmp_path, 1, devices=8)


@pytest.mark.long
def test_columns_of_a_row_lie_with_two_processes(runs: dict[str, Any], tmp_path: Path) -> None:
    """Each reads whole rows, and its devices hold the halves of them, once."""
    mesh = MeshConfig(data=1, sequence=2)
    spread = {name: dataclasses.replace(runs[name], mesh=mesh) for name in ("ee_tuning", "cached")}
    do(written(spread, tmp_path, "many"), tmp_path, 2)
    for name, run in spread.items():
        check_run(name, run, tmp_path, 2)


@pytest.mark.long
def test_several_processes_measure_and_export_as_one(runs: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    model, params = load(base)
    config: Any = model.config
    with_exit = attach_exits(config, params, (ExitConfig(1, "norm", tied=True),), jax.random.key(0))
    folder = tmp_path / "exits"
    save_model(folder, *with_exit, Tokenizer.load(base))

    measured = ["--model", str(folder), "--data", runs["soft"].data.paths[0], "--tokens", "3000"]
    measured += ["--seq-len", "32"]
    cut = ["--continuations", "0"]

    def commands(side: str) -> list[list[str]]:
        thresholds, quality = (str(tmp_path / f"{side}.{name}.json") for name in ("thresholds", "quality"))
        fitted = ["calibrate", *measured, *cut, "--target", "0.5", "--out", thresholds]
        return [fitted, ["evaluate", *measured, *cut, "--thresholds", thresholds, "--json", quality]]

    jobs = [["command", each] for each in commands("many")]
    jobs.append(["export", [str(base), str(tmp_path / "many.hf")]])
    printed = do(jobs, tmp_path, 2)
    assert "agreement" in printed[0]
    assert "agreement" not in printed[1]

    for each in commands("one"):
        assert cli.main(each) == 0
    for name in ("thresholds", "quality"):
        one, many = (json.loads((tmp_path / f"{side}.{name}.json").read_text()) for side in ("one", "many"))
        for values in (one, many):
            values.pop("tokens_per_s", None)
            values.get("provenance", {}).pop("date", None)
        assert many == one

    hf.export(config, params, tmp_path / "one.hf")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "many.hf" / file).read_bytes() == (tmp_path / "one.hf" / file).read_bytes()
    prints = [(tmp_path / f"many.hf.{i}").read_text() for i in range(2)]
    assert prints == [weights_fingerprint(params)] * 2


@pytest.mark.long
def test_the_command_ends_well_and_refuses_in_one_line(runs: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_dict(runs["soft"])))
    train = ["-m", "elastic_lm", "train", "--config", str(file), "--workdir"]

    done = together([[*train, str(tmp_path / "done")]] * 2)
    assert [each.returncode for each in done] == [0, 0], done
    assert "held out" in done[0].stdout
    assert done[1].stdout == ""

    other = [*train, str(tmp_path / "other"), "--config.train.lr=0.5"]
    for each in together([[*train, str(tmp_path / "other")], other]):
        assert each.returncode == 2
        assert each.stderr.count("\n") == 1, each.stderr
        assert "has another config or workdir than [" in each.stderr
    assert not (tmp_path / "other").exists()

    # Two runs in one workdir are two processes that know nothing of each other, or one too many.
    missing = together([[*train, str(tmp_path / "alone"), "--start-timeout", "2", "--processes", "2"]])
    assert missing[0].returncode == 2
    assert "process 1 of 2 did not come to 127.0.0.1:" in missing[0].stderr

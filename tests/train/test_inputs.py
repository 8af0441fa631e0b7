"""A run that goes on reads what it began with, or is refused."""

import copy
import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_lm.checkpoints.native import save_model
from elastic_lm.config.model import ExitConfig
from elastic_lm.config.task import TaskConfig
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.depth import EETuningConfig
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.testing import random_params, tiny_config
from elastic_lm.train import fit
from elastic_lm.train.config import RunConfig, TaskRun, TrainConfig
from elastic_lm.train.inputs import FILE, check_inputs, run_inputs, save_inputs

CONFIG = tiny_config(n_layers=2, vocab_size=300)


def prepared(seed: int = 0, text: str = "some text", **changes: Any) -> Any:
    """As much of a run at step 0 as its inputs are read from."""
    config = dataclasses.replace(CONFIG, **changes)
    method = SimpleNamespace(config=config)
    params = random_params(CONFIG, seed)
    weights, tokenizer = weights_fingerprint(params), train_bpe([text], 300)
    return SimpleNamespace(params=params, weights=weights, tokenizer=tokenizer, method=method)


@pytest.fixture
def begun(run_config: RunConfig, tmp_path: Path) -> tuple[RunConfig, Path]:
    """A run from a checkpoint that has begun."""
    run = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, init_from="base"))
    save_inputs(run_inputs(run, prepared()), tmp_path / "run")
    return run, tmp_path / "run"


def check(run: RunConfig, workdir: Path, state: Any = None) -> None:
    check_inputs(run, run_inputs(run, state or prepared()), workdir)


def test_what_has_not_changed_passes(begun: tuple[RunConfig, Path], text_file: Path, tmp_path: Path) -> None:
    run, workdir = begun
    check(run, workdir)
    check(run, tmp_path / "new")
    os.utime(text_file)  # all of a small file is compared, so that its time does not matter
    check(run, workdir)
    check(run, workdir, prepared(dtype="bfloat16", param_dtype="bfloat16"))  # the same run on another device
    stored = json.loads((workdir / FILE).read_text())
    del stored["model"]["rope"]  # a field that the release before did not have
    (workdir / FILE).write_text(json.dumps(stored))
    check(run, workdir)


def test_a_changed_model_is_named(begun: tuple[RunConfig, Path]) -> None:
    run, workdir = begun
    for state, message in (
        (prepared(seed=1), r"train\.init_from='base': its weights changed since the run in .*run began; put"),
        (prepared(norm_eps=0.1), r"train\.init_from='base': its norm_eps changed from 1e-05 to 0\.1 since"),
        (prepared(text="another"), r"train\.init_from='base': its tokenizer changed"),
    ):
        with pytest.raises(ValueError, match=message + r".*another workdir"):
            check(run, workdir, state)


def test_a_changed_teacher_is_named(begun: tuple[RunConfig, Path]) -> None:
    run, workdir = begun
    states = [prepared(), prepared(), prepared()]
    for seed, state in zip((1, 1, 2), states, strict=True):
        state.params = {**state.params, "teacher": random_params(CONFIG, seed)}
    save_inputs(run_inputs(run, states[0]), workdir)
    check(run, workdir, states[1])
    with pytest.raises(ValueError, match=r"method\.teacher_from='': its weights changed since"):
        check(run, workdir, states[2])


def test_changed_data_are_named(begun: tuple[RunConfig, Path], text_file: Path) -> None:
    run, workdir = begun
    content, status = text_file.read_bytes(), text_file.stat()
    for changed in (content + b"\n", content[:500] + b"?" + content[501:]):
        text_file.write_bytes(changed)
        os.utime(text_file, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(ValueError, match=rf"{text_file}: has changed since the run in .* began"):
            check(run, workdir)
    text_file.write_bytes(content)
    check(run, workdir)


def test_files_that_come_and_go(begun: tuple[RunConfig, Path], tmp_path: Path) -> None:
    run, workdir = begun
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(name)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, paths=(str(folder),)))
    save_inputs(run_inputs(run, prepared()), workdir)
    (folder / "c.txt").write_text("new")
    with pytest.raises(ValueError, match=r"c\.txt: is new since"):
        check(run, workdir)
    (folder / "c.txt").unlink()
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt: is gone since"):
        check(run, workdir)


def test_a_large_file_that_was_written_again(begun: tuple[RunConfig, Path], text_file: Path) -> None:
    """Samples do not see all of it, so that all of it is read where its time differs."""
    run, workdir = begun
    content = bytearray(2**21)
    text_file.write_bytes(content)
    save_inputs(run_inputs(run, prepared()), workdir)
    check(run, workdir)
    os.utime(text_file, (1, 1))  # a copy
    check(run, workdir)
    save_inputs(run_inputs(run, prepared()), workdir)
    content[70_000] = 1  # between the samples
    text_file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{text_file}: has changed since the run in .* began"):
        check(run, workdir)

    stored = json.loads((workdir / FILE).read_text())
    del stored["files"][str(text_file)]["crc32"]
    (workdir / FILE).write_text(json.dumps(stored))
    os.utime(text_file, (1, 2))
    with pytest.raises(ValueError, match=rf"{text_file}: was written again \(first .*, now 1970-01-01"):
        check(run, workdir)


@pytest.mark.parametrize("text", ["{}", '{"format": "elastic_lm inputs 1", "files": [], "model": {}}'])
def test_damaged_records_are_refused(begun: tuple[RunConfig, Path], text: str) -> None:
    run, workdir = begun
    (workdir / FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"{FILE}: does not say what the run there reads"):
        check(run, workdir)


def test_other_sources(run_config: RunConfig, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    records.write_text('{"sentence": "good", "label": 1}\n')
    task = TaskConfig(paths=(str(records),), tokenizer="words.json")
    found = run_inputs(TaskRun(task=task, train=TrainConfig(init_from="bert")), prepared())
    assert [*found["files"]] == [str(records)]

    stdlib = dataclasses.replace(run_config, data=dataclasses.replace(run_config.data, source="stdlib"))
    found = run_inputs(stdlib, prepared())
    assert [*found["files"]] == ["the Python standard library"]
    assert found["model"] == {}  # drawn, not read
    save_inputs(found, tmp_path)
    other = copy.deepcopy(found)
    other["files"]["the Python standard library"]["digest"] = "of another version"
    with pytest.raises(ValueError, match=r"the Python standard library: has changed since"):
        check_inputs(stdlib, other, tmp_path)


def test_exits_are_never_tuned_on_over_another_model(run_config: RunConfig, tmp_path: Path) -> None:
    tokenizer = train_bpe(["some text"], 300)
    save_model(tmp_path / "base", CONFIG, random_params(CONFIG, seed=0), tokenizer)
    train = dataclasses.replace(
        run_config.train, init_from=str(tmp_path / "base"), steps=2, warmup=1, eval_every=0, eval_batches=1
    )
    exits = (ExitConfig(1, kind="norm", tied=True),)
    run = dataclasses.replace(run_config, model=None, exits=exits, train=train, method=EETuningConfig())
    fit(run, tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / FILE).read_text())["weights"]
    assert recorded == weights_fingerprint(random_params(CONFIG, seed=0))  # without the exits

    save_model(tmp_path / "base", CONFIG, random_params(CONFIG, seed=1), tokenizer, overwrite=True)
    longer = dataclasses.replace(run, train=dataclasses.replace(train, steps=4))
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match=r"train\.init_from='.*base': its weights changed"):
        fit(longer, tmp_path / "run")
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before

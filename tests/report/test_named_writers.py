"""Writers that a run names: jsonl, tensorboard, wandb (a module that stands for it), and a user's own."""

import builtins
import dataclasses
import importlib.util
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.config.log import LogConfig
from elastic_lm.report import writers
from elastic_lm.report.writers import JsonlWriter, TensorBoardWriter, check_writers, make_writers
from elastic_lm.train.config import RunConfig
from elastic_lm.train.run import fit

OWN = """
class Notes:
    def __init__(self, workdir, config):
        self.path = workdir / f"notes_{config['train']['steps']}.txt"
        self.lines = []

    def write(self, step, values):
        self.lines.append(f"{step} {sorted(values)[0]}")

    def close(self):
        self.path.write_text("\\n".join(self.lines))


class Deaf:
    def __init__(self, workdir, config):
        pass


class Broken:
    def __init__(self, workdir):
        pass


number = 5
"""


class FakeRun:
    """What `wandb.init` gives."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.id = options, options["id"] or "abc123"
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        assert not self.finished
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(options))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init = init  # pyright: ignore[reportAttributeAccessIssue]
    module.__spec__ = importlib.util.spec_from_loader("wandb", None, origin="here")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "notes_of_a_user.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "notes_of_a_user"
    sys.modules.pop("notes_of_a_user", None)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Lets a package look as if it was not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        writers.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )


def test_wandb_gets_the_config_and_the_numbers_and_goes_on_with_its_run(
    wandb_runs: list[FakeRun], run_config: RunConfig, tmp_path: Path
) -> None:
    log = LogConfig(writers=("jsonl", "wandb"), project="exits", name="first")
    run = dataclasses.replace(run_config, log=log)
    fit(dataclasses.replace(run, train=dataclasses.replace(run.train, steps=3)), tmp_path)
    fit(run, tmp_path)

    first, second = wandb_runs
    assert {key: first.options[key] for key in ("project", "name", "id", "resume", "dir")} == {
        "project": "exits",
        "name": "first",
        "id": None,
        "resume": "allow",
        "dir": str(tmp_path),
    }
    assert first.options["config"]["train"]["lr"] == run.train.lr
    assert first.options["config"]["method"]["name"] == "pretraining"
    assert second.options["id"] == "abc123"
    assert [step for step, values in first.logged if "loss" in values] == [1, 2, 3]
    assert [step for step, values in second.logged if "loss" in values] == [4, 5, 6]
    assert {"loss", "lr", "step_seconds", "grad_norm"} <= set(first.logged[0][1])
    assert first.finished
    assert second.finished


def test_a_writer_of_ones_own_is_named_or_passed(
    own_module: str, run_config: RunConfig, tmp_path: Path
) -> None:
    class Passed:
        closed = False
        steps: tuple[int, ...] = ()

        def write(self, step: int, values: Mapping[str, float]) -> None:
            self.steps += (step,)

        def close(self) -> None:
            self.closed = True

    passed = Passed()
    run = dataclasses.replace(run_config, log=LogConfig(writers=(f"{own_module}:Notes",)))
    fit(run, tmp_path / "run", writers=[passed])
    lines = (tmp_path / "run" / "notes_6.txt").read_text().splitlines()
    steps = [1, 2, 3, 3, 4, 5, 6, 6, 6]  # the last line says where the time went
    assert [int(line.split()[0]) for line in lines] == steps
    assert lines[3] == "3 eval_accuracy"
    assert passed.steps == tuple(steps)
    assert passed.closed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_module_here:X",
            r"log\.writers\[0\]=.*: no_such_module_here cannot be imported: ModuleNotFound",
        ),
        ("notes_of_a_user:Other", r"log\.writers\[0\]=.*: notes_of_a_user has no class Other"),
        ("notes_of_a_user:number", r"has no class number"),
    ],
)
def test_a_class_that_is_not_there_is_refused_before_the_run(
    own_module: str, run_config: RunConfig, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(dataclasses.replace(run_config, log=LogConfig(writers=(name,))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes_of_a_user:Deaf", r"needs the methods write\(step, values\) and close\(\)"),
        ("notes_of_a_user:Broken", r"cannot be made of \(workdir, config\): TypeError"),
    ],
)
def test_a_class_that_is_no_writer_is_refused(
    own_module: str, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_writers(LogConfig(writers=("jsonl", name)), tmp_path, {}, 0)


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    without(monkeypatch, package)
    message = rf"log\.writers\[1\]='{name}': needs {package}: pip install \"elastic-lm\[{name}\]\""
    with pytest.raises(ValueError, match=message):
        check_writers(LogConfig(writers=("jsonl", name)))


def test_without_names_tensorboard_is_written_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    made = make_writers(LogConfig(), tmp_path, {}, 0)
    assert [type(writer) for writer in made] == [JsonlWriter, TensorBoardWriter]
    for writer in made:
        writer.close()
    without(monkeypatch, "tensorboardX")
    (alone,) = make_writers(LogConfig(), tmp_path, {}, 0)
    assert isinstance(alone, JsonlWriter)
    alone.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"writers": ("csv",)},
            r"log\.writers\[0\]='csv': must be one of jsonl, tensorboard, wandb, or module:Class",
        ),
        ({"writers": ("a:",)}, r"log\.writers\[0\]='a:': must be one of"),
        ({"writers": ("jsonl", "jsonl")}, r"log\.writers=.*: names a writer twice"),
        ({"writers": "jsonl"}, r"log\.writers='jsonl': must be a tuple"),
        ({"project": "p"}, r"log\.project='p': is read by the writer wandb alone"),
        ({"writers": ("jsonl",), "name": "n"}, r"log\.name='n': is read by the writer wandb alone"),
    ],
)
def test_what_a_log_section_refuses(fields: dict[str, builtins.object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogConfig(**fields)  # pyright: ignore[reportArgumentType]

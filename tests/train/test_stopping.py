"""Runs that are asked to stop, that another process has, and that the disk has no room for."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import numpy as np
import pytest
from training_runs import metric_lines

from elastic_lm.files.locks import LOCK_FILE, only_process
from elastic_lm.train import Stopped, loop, run
from elastic_lm.train.config import RunConfig
from elastic_lm.train.inputs import FILE
from elastic_lm.train.run import fit


def test_a_run_that_was_asked_to_stop_goes_on_bit_identically(run_config: RunConfig, tmp_path: Path) -> None:
    straight = fit(run_config, tmp_path / "straight")
    workdir, answers = tmp_path / "stopped", iter([False, False, True, False, True])
    for step in (3, 5):  # of which no checkpoint would be written otherwise
        with pytest.raises(Stopped, match=f"stopped after step {step} of 6, which is saved; run it again"):
            fit(run_config, workdir, stop=lambda: next(answers))
        assert (workdir / "checkpoints" / str(step)).is_dir()
        assert not (workdir / "model").exists()
        assert not (workdir / LOCK_FILE).exists()
    resumed = fit(run_config, workdir, stop=lambda: pytest.fail("asked after the last step"))
    chex.assert_trees_all_equal(straight[1:], resumed[1:])

    def values(folder: Path) -> list[dict]:
        kept = ("step", "loss", "grad_norm", "eval_loss")
        return [{name: line[name] for name in kept if name in line} for line in metric_lines(folder)]

    assert values(workdir) == values(tmp_path / "straight")


def test_several_processes_stop_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop._agreed(True, due=False)
    assert not loop._agreed(False, due=True)
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    others = np.asarray([False, True])
    monkeypatch.setattr(loop.multihost_utils, "process_allgather", lambda asked: others | asked)
    assert loop._agreed(False, due=True)
    assert not loop._agreed(True, due=False)  # the others would not come to this step's meeting
    others = np.asarray([False, False])
    assert not loop._agreed(False, due=True)


def test_one_process_writes_the_files_of_a_run(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: Any = SimpleNamespace(learned=False)
    workdir = tmp_path / "run"
    monkeypatch.setattr(run, "is_first", lambda: False)
    with pytest.raises(ValueError, match="is another folder in this process than in the first one"):
        run.save_files(run_config, prepared, {"files": {}}, workdir)
    assert not workdir.exists()
    monkeypatch.setattr(run, "is_first", lambda: True)
    run.save_files(run_config, prepared, {"files": {}}, workdir)
    assert {path.name for path in workdir.glob("*")} == {"run.json", FILE}


def test_one_process_at_a_time(run_config: RunConfig, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    with (
        only_process(workdir / LOCK_FILE, workdir, "wait"),
        pytest.raises(ValueError, match=r"run: in use by process \d+ on .*; wait for its end, or choose an"),
    ):
        fit(run_config, workdir)
    assert not workdir.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits")
@pytest.mark.long
def test_a_checkpoint_without_room_is_one_line_and_leaves_nothing(
    run_config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from limits import files_of_at_most

    straight = fit(run_config, tmp_path / "straight")
    with pytest.raises(Stopped):
        fit(run_config, tmp_path / "full", stop=iter([False, True]).__next__)
    capfd.readouterr()
    with files_of_at_most(10_000), pytest.raises(OSError, match="File too large") as caught:
        fit(run_config, tmp_path / "full")
    assert caught.value.filename == str(tmp_path / "full" / "checkpoints" / "4")
    assert "Traceback" not in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir()) == ["2"]
    chex.assert_trees_all_equal(straight[1], fit(run_config, tmp_path / "full")[1])

"""Runs that are asked to stop, that another process has, and that the disk has no room for."""

import itertools
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import changed, metric_lines

from elastic_lm.checkpoints import native
from elastic_lm.checkpoints.native import Checkpoints
from elastic_lm.cli import many_processes
from elastic_lm.files.locks import LOCK_FILE, only_process
from elastic_lm.processes import LostProcess
from elastic_lm.train import Stopped, run, together
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


def test_several_processes_stop_and_save_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert together.agreed(True, True, due=False) == (True, True)
    assert together.agreed(False, False, due=True) == (False, False)
    monkeypatch.setattr(together.jax, "process_count", lambda: 2)
    first = np.asarray([True, False])  # process 0 was asked to stop
    gathered = lambda own: np.stack([first, own])  # noqa: E731
    monkeypatch.setattr(together.multihost_utils, "process_allgather", gathered)
    assert together.agreed(False, True, due=True) == (True, False), "the clock of process 0 counts"
    assert together.agreed(True, True, due=False) == (False, False), "the others do not come to this meeting"
    first = np.asarray([False, True])
    assert together.agreed(False, False, due=True) == (False, True)


def test_minutes_between_checkpoints_and_steps_kept_for_good(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count()
    monkeypatch.setattr(together, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(now)))
    saved, save = [], Checkpoints.save

    def noted(self: Checkpoints, step: int, *rest: Any) -> None:
        saved.append(step)
        save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", noted)
    # Looked at once a step, and set back by every checkpoint.
    config = changed(run_config, save_every=100, save_minutes=2, keep=1, keep_period=4, log_every=3)
    fit(config, tmp_path)
    assert saved == [2, 4, 6]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]


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


def test_a_save_that_fails_meanwhile_ends_the_run_at_a_later_step(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = itertools.chain([None, ValueError("bits differ")], itertools.repeat(None))

    def check(tree: Any, read: Any) -> None:
        if (error := next(checks)) is not None:
            raise error

    monkeypatch.setattr(native, "check_same", check)
    reason = r"checkpoints/4: does not read back as it was written \(ValueError: bits differ\) and is removed"
    with pytest.raises(OSError, match=reason):
        fit(run_config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_other_errors_are_not_hidden_by_that_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check(tree: Any, read: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "check_same", check)
    batches: Any = SimpleNamespace(get_state=lambda: {"next": 1})

    def diverge() -> None:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, {"a": jnp.zeros(3)}, batches)
            raise FloatingPointError("loss is nan")

    with pytest.raises(FloatingPointError, match="loss is nan"):
        diverge()
    assert "checkpoint" in caplog.text
    assert "1 was not saved: OSError: [Errno 28] No space left on device" in caplog.text


@pytest.mark.parametrize(
    ("said", "stays"), [(b"Differs: process 1 reads otherwise", False), (b"OSError: no room", True)]
)
def test_what_another_process_could_not_save_ends_all_of_them(
    said: bytes, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: Any = SimpleNamespace(get_state=lambda: {"next": 1})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.zeros(3)}, batches)
    assert checkpoints._saving is not None
    checkpoints._saving[1].wait()
    monkeypatch.setattr(native.jax, "process_count", lambda: 2)
    monkeypatch.setattr(native, "bytes_of_all", lambda own: [own, said])
    checkpoints.poll()  # which none of several does
    with pytest.raises(OSError, match=rf"1: was not saved by all \(process 1: {said.decode()}\)"):
        checkpoints.settle()
    assert (tmp_path / "1").is_dir() == stays


@pytest.mark.parametrize(
    ("error", "waits"), [(BrokenPipeError, True), (ConnectionError, True), (LostProcess, False)]
)
def test_a_save_is_waited_for_unless_another_process_is_gone(
    error: type[Exception], waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "LOST_WAIT", 0.1)
    held = threading.Event()
    monkeypatch.setattr(native, "check_same", lambda *args: held.wait(60))
    batches: Any = SimpleNamespace(get_state=lambda: {"next": 1})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.zeros(3)}, batches)
    assert checkpoints._saving is not None
    saving = checkpoints._saving[1]
    if waits:
        threading.Timer(1.0, held.set).start()
    with pytest.raises(error), checkpoints:
        raise error
    assert saving.done() == waits
    held.set()
    saving.wait()


def test_the_loss_of_another_process_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose() -> None:
        with together.noticing_lost_processes():
            raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")

    with pytest.raises(ValueError, match="Gloo"):
        lose()
    monkeypatch.setattr(together.jax, "process_count", lambda: 2)
    with pytest.raises(LostProcess, match=r"another process of this run .* start all of them again"):
        lose()
    monkeypatch.setattr(many_processes._Together, "several", True)
    gloo = ValueError("UNKNOWN: Gloo all-reduce failed")
    assert many_processes.lost(gloo).endswith("see what it said (UNKNOWN: Gloo all-reduce failed)")
    assert not many_processes.lost(ValueError("--lr=0"))
    with pytest.raises(ValueError, match="lr"), together.noticing_lost_processes():
        raise ValueError("train.lr=0")


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

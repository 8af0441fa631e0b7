"""A quickstart replaces its own folders and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_lm.checkpoints.native import check_target
from elastic_lm.cli import main as cli
from elastic_lm.files import unfinished
from elastic_lm.quickstart.folders import FILES, MODEL, TUNING, begin, check_files, check_replaceable, renew


def test_own_folders_are_made_anew(tmp_path: Path) -> None:
    own = tmp_path / "out" / "model"
    renew(own, None)
    (own / "elastic_config.json").touch()
    renew(own, tmp_path / "elsewhere")
    assert not (own / "elastic_config.json").exists()
    check_replaceable(own, None)


@pytest.mark.parametrize("name", ["thesis.txt", "elastic_config.json", "run.json", "checkpoints"])
def test_foreign_folders_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model" / name
    file.parent.mkdir()
    file.touch()
    for target in (file.parent, file):
        with pytest.raises(ValueError, match=f"{target} was not written by an earlier quickstart"):
            renew(target, None)
    assert file.exists()


@pytest.mark.parametrize("folder", ["model", "tuning"])
def test_trained_models_are_refused_before_any_work(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / folder / "elastic_config.json"
    trained.parent.mkdir()
    trained.touch()
    assert cli.main(["quickstart", "--tiny", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "was not written by an earlier quickstart" in printed.err
    assert "1/6" not in printed.out
    assert trained.exists()


@pytest.mark.parametrize("inside", ["", "model", "../model"])
def test_the_model_that_is_read_is_never_removed(tmp_path: Path, inside: str) -> None:
    own = tmp_path / "model"
    renew(own, None)
    with pytest.raises(ValueError, match="the model is read from it"):
        renew(own, own / inside)
    assert own.exists()


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_ours_are_kept(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").touch()
    check_files(tmp_path)
    (tmp_path / name).write_text("not ours")
    assert cli.main(["quickstart", "--tiny", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert f"{tmp_path} was not written by an earlier quickstart" in printed.err
    assert f"its {name} would be overwritten: move what is there away" in printed.err
    assert "1/6" not in printed.out
    assert (tmp_path / name).read_text() == "not ours"


def test_files_of_an_earlier_run_are_written_anew(tmp_path: Path) -> None:
    check_files(tmp_path / "new")
    renew(tmp_path / TUNING, None)
    for name in FILES:
        (tmp_path / name).touch()
    check_files(tmp_path)


def test_nothing_of_an_earlier_run_stays(tmp_path: Path) -> None:
    begin(tmp_path, None)
    renew(tmp_path / MODEL, None)
    for name in (*FILES, "preview_99.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    check_files(tmp_path)
    begin(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {TUNING, "notes.txt"}


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.mark.parametrize("call", range(12))
def test_a_kill_while_an_earlier_run_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    for folder in (TUNING, MODEL):
        renew(tmp_path / folder, None)
        (tmp_path / folder / "elastic_config.json").touch()
    for name in FILES:
        (tmp_path / name).touch()

    calls = iter(range(100))

    def dying(real: Callable) -> Callable:
        def act(*args, **named):
            if next(calls) == call:
                raise Killed
            return real(*args, **named)

        return act

    with monkeypatch.context() as patch:
        for name in ("unlink", "rename", "mkdir", "touch"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr(unfinished, "remove_anything", lambda _: None)  # nothing is tidied up
        try:
            begin(tmp_path, None)
        except Killed:
            pass
        else:
            assert call > 6, "there are at least seven steps"

    check_files(tmp_path)
    begin(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {TUNING}


@pytest.mark.parametrize("inside", ["", "model"])
def test_other_commands_say_what_a_quickstart_folder_is(tmp_path: Path, inside: str) -> None:
    renew(tmp_path / "model", None)
    (tmp_path / "model" / "elastic_config.json").touch()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="belongs to `elastic-lm quickstart`"):
            check_target(tmp_path / inside, overwrite)


def test_training_into_a_quickstart_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renew(tmp_path / "out" / "model", None)
    config = tmp_path / "config.py"
    config.write_text("def get_config(arg=''):\n    return {'train': {'init_from': 'nowhere'}}\n")
    assert cli.main(["train", "--config", str(config), "--workdir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out' / 'model'}: belongs to `elastic-lm quickstart`" in error
    assert "or workdir" in error

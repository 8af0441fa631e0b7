"""A quickstart replaces its own folders and nothing else."""

from pathlib import Path

import pytest

from elastic_lm import cli
from elastic_lm.quickstart.folders import check_replaceable, renew


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

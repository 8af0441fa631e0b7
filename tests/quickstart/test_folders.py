"""A quickstart replaces its own folders and nothing else."""

from pathlib import Path

import pytest

from elastic_lm.quickstart.folders import remove

MARKS = ("elastic_config.json",)


def test_own_folders_are_removed(tmp_path: Path) -> None:
    remove(tmp_path / "none", MARKS, None)
    own = tmp_path / "model"
    own.mkdir()
    (own / "elastic_config.json").touch()
    remove(own, MARKS, tmp_path / "elsewhere")
    assert not own.exists()


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    thesis = tmp_path / "model" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.touch()
    for target in (thesis.parent, thesis):
        with pytest.raises(ValueError, match=f"{target} was not written by an earlier quickstart"):
            remove(target, MARKS, None)
    assert thesis.exists()


@pytest.mark.parametrize("inside", ["", "model", "../model"])
def test_the_model_that_is_read_is_never_removed(tmp_path: Path, inside: str) -> None:
    own = tmp_path / "model"
    own.mkdir()
    (own / "elastic_config.json").touch()
    with pytest.raises(ValueError, match="the model is read from it"):
        remove(own, MARKS, own / inside)
    assert (own / "elastic_config.json").exists()

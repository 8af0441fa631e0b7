"""The standard library as a corpus: fixed, disjoint splits."""

import sysconfig
from pathlib import Path

import pytest

from elastic_lm.data import stdlib
from elastic_lm.data.stdlib import stdlib_files

ROOT = Path(sysconfig.get_path("stdlib"))


def names(split) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in stdlib_files(split)]


def test_splits_are_disjoint_and_sized_as_said() -> None:
    train, calibration, test = (set(names(split)) for split in ("train", "calibration", "test"))
    assert train.isdisjoint(calibration | test)
    assert calibration.isdisjoint(test)
    total = len(train | calibration | test)
    assert 0.85 < len(train) / total < 0.95
    assert len(calibration) > 10
    assert len(test) > 10


def test_a_file_has_the_same_split_everywhere() -> None:
    assert "argparse.py" in names("train")
    assert "textwrap.py" in names("test")
    assert "bisect.py" in names("calibration")


def test_tests_packages_and_tables_are_left_out() -> None:
    parts = {part for split in stdlib.SHARES for name in names(split) for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "topics.py"}
    assert not [part for part in parts if part.startswith("_sysconfigdata")]


def test_unknown_splits_and_missing_sources_are_named(monkeypatch, tmp_path) -> None:
    with pytest.raises(ValueError, match="split='valid'"):
        stdlib_files("valid")
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no standard library sources"):
        stdlib_files("train")

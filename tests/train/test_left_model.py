"""Models that a finished run has left in a store."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from elastic_lm.files.remote import write_object
from elastic_lm.files.remote_models import UNFINISHED
from elastic_lm.train.left_model import FILE, is_left, note_left

MODEL = "memory://b/run/model"


@pytest.fixture(autouse=True)
def store() -> Iterator[None]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield
    files.store.clear()


def test_a_model_is_left_until_it_changes_or_the_run_goes_on(tmp_path: Path) -> None:
    assert not is_left(tmp_path, MODEL, 6)
    (tmp_path / FILE).write_text("{}")
    assert not is_left(tmp_path, MODEL, 6)  # nothing is there

    write_object(f"{MODEL}/elastic_config.json", b"{}")
    assert not is_left(tmp_path, MODEL, 6)
    note_left(tmp_path, MODEL, 6)
    assert is_left(tmp_path, MODEL, 6)
    assert not is_left(tmp_path, MODEL, 8)

    write_object(f"{MODEL}/{UNFINISHED}", b"")
    assert not is_left(tmp_path, MODEL, 6)
    fsspec.filesystem("memory").rm_file(f"{MODEL}/{UNFINISHED}")
    assert is_left(tmp_path, MODEL, 6)
    write_object(f"{MODEL}/elastic_config.json", b"{} ")  # of another run
    assert not is_left(tmp_path, MODEL, 6)


def test_nothing_is_noted_on_this_machine(tmp_path: Path) -> None:
    note_left(tmp_path, tmp_path / "model", 6)
    assert not is_left(tmp_path, tmp_path / "model", 6)
    assert not [*tmp_path.iterdir()]

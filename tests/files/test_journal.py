"""Rows from files, and an output that goes on where a killed process left it."""

import gzip
import json
import os
import pathlib

import numpy as np
import pytest

from elastic_lm.files.journal import Journal, count_records, read_records

RUN = {"swift": "a", "threshold": 1.5}


@pytest.fixture(params=["out.jsonl", "out.jsonl.gz", "out.jsonl.GZ"])
def path(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "folder" / request.param


def lines(path: pathlib.Path) -> list[int]:
    return [row["index"] for row in read_records(path)]


def write(path: pathlib.Path, *batches: range) -> None:
    journal = Journal(path, RUN)
    for batch in batches:
        journal.append([{"index": i, "output": "x" * i} for i in batch])
    journal.close()


def test_every_end_of_a_process_keeps_whole_rows(path: pathlib.Path) -> None:
    write(path, range(3), range(3, 7))
    data = path.read_bytes()
    for size in range(len(data) + 1):  # killed after any byte
        path.write_bytes(data[:size])
        journal = Journal(path, RUN)
        kept = journal.records
        journal.append([{"index": i} for i in range(kept, 9)])
        journal.close()
        assert lines(path) == list(range(9))
    assert kept == 7


def test_another_run_is_refused(path: pathlib.Path) -> None:
    write(path, range(3))
    with pytest.raises(ValueError, match=r"was begun with threshold=1.5, now threshold=2; choose another"):
        Journal(path, {**RUN, "threshold": 2})
    with pytest.raises(ValueError, match=r"was begun with text_field=None, now text_field='a'"):
        Journal(path, {**RUN, "text_field": "a"})
    with pytest.raises(ValueError, match=r"was begun with swift='a', now swift=None"):
        Journal(path, {"threshold": 1.5})
    (path.parent / f"{path.name}.run.json").unlink()
    with pytest.raises(ValueError, match="was not written by a run like this"):
        Journal(path, RUN)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_write_that_fails_is_not_repeated(path: pathlib.Path, monkeypatch, error: type) -> None:
    synchronise, calls = os.fsync, []

    def fsync(file: int) -> None:
        calls.append(file)
        synchronise(file)
        if len(calls) == 3:  # the settings, a first row, a second row
            raise error

    monkeypatch.setattr(os, "fsync", fsync)
    journal = Journal(path, RUN)
    journal.append([{"index": 0}])
    with pytest.raises(error):
        journal.append([{"index": 1}])
    with pytest.raises(ValueError, match="an earlier write failed"):
        journal.append([{"index": 1}])
    journal.close()
    assert lines(path) == [0, 1]
    journal = Journal(path, RUN)
    assert journal.records == 2
    journal.close()


def test_what_follows_damage_is_done_again(path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, range(3), range(3, 6))
    whole = path.read_bytes()
    write(other := path.with_name("other" + path.suffix), range(2))
    path.write_bytes(whole + other.read_bytes())  # rows 0 and 1 once more
    journal = Journal(path, RUN)
    assert journal.records == 6
    journal.append([{"index": 6}])
    journal.close()
    assert lines(path) == list(range(7))
    assert "row 6 is damaged or out of place: it and what follows it, 2 lines" in capsys.readouterr().err


def test_a_line_in_the_middle(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, range(3))
    path.write_text(path.read_text().replace('"index": 1', '"index": 7'))
    assert Journal(path, RUN).records == 1
    assert lines(path) == [0]


def test_one_process_at_a_time(path: pathlib.Path) -> None:
    journal = Journal(path, RUN)
    with pytest.raises(ValueError, match="another process is writing it"):
        Journal(path, RUN)
    journal.close()
    Journal(path, RUN).close()


def test_lines_are_replaced_at_once(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, range(3), range(3, 6))
    journal = Journal(path, RUN)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", _full)
        with pytest.raises(OSError, match="full"):
            journal.replace({1: {"index": 1, "output": "new"}})
    assert path.read_bytes() == before
    journal.replace({1: {"index": 1, "output": "new"}})
    with pytest.raises(ValueError, match="another process"):
        Journal(path, RUN)
    journal.append([{"index": 6}])
    journal.close()
    found = list(read_records(path))
    assert [row["index"] for row in found] == list(range(7))
    assert [row.get("output") for row in found[:4]] == ["", "new", "xx", "xxx"]
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.run.json"]


def _full(*_: object) -> None:
    raise OSError("full")


def test_rows_and_what_is_none(tmp_path: pathlib.Path) -> None:
    plain, packed = tmp_path / "in.jsonl", tmp_path / "in.jsonl.gz"
    text = '{"a": 1}\n\n{"a": "é"}'
    plain.write_text(text, encoding="utf-8")
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (plain, packed):
        assert list(read_records(path)) == [{"a": 1}, {"a": "é"}]
        assert count_records(path) == 2
    plain.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"in.jsonl line 2: list is not a JSON object"):
        list(read_records(plain))
    plain.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match=r"in.jsonl line 2 is not JSON"):
        list(read_records(plain))
    packed.write_bytes(packed.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a complete gzip file"):
        list(read_records(packed))
    with pytest.raises(FileNotFoundError):
        list(read_records(tmp_path / "none"))


def test_other_outputs_become_json(tmp_path: pathlib.Path) -> None:
    journal = Journal(tmp_path / "out.jsonl", RUN)
    journal.append([])
    journal.append([{"index": 0, "output": [pathlib.PurePosixPath("x"), np.int64(3)]}])
    journal.close()
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"index": 0, "output": ["x", 3]}

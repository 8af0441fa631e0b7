"""Files of records: JSON arrays, Parquet and patterns of names."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from elastic_lm.data.records import Records
from elastic_lm.data.sources import JsonLines, find_files
from elastic_lm.data.splitting import read_pieces

ROWS = [{"text": f"größe {i} 🙂", "n": i, "deep": [{"a": i}]} for i in range(20)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_an_array_gives_its_records(tmp_path: Path, indent, packed: bool) -> None:
    data = json.dumps(ROWS, indent=indent, ensure_ascii=False).encode()
    file = tmp_path / ("a.json.gz" if packed else "a.json")
    file.write_bytes(gzip.compress(data) if packed else b"\xef\xbb\xbf \n" + data + b"\n")
    records = Records([file])
    assert [record for _, record in (records[i] for i in range(len(records)))] == ROWS
    assert records[4][0] == f"{file} record 5"
    texts = JsonLines([file], "text")
    assert [texts[i].text for i in range(len(texts))] == [row["text"] for row in ROWS]


DAMAGED = {
    '[{"a": 1}, {"a": ]': "record 2 is not JSON",
    '[{"a": 1}, 2]': "record 2: int is not a JSON object",
    '[{"a": 1}': "not complete after record 1",
    '[{"a": 1}] x': "text follows the array",
    "[]": "no records in it",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_arrays_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=DAMAGED[text]):
        Records([tmp_path / "a.json"])


def test_lists_on_lines_are_still_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="line 1: list is not a JSON object"):
        _ = Records([tmp_path / "a.jsonl"])[0]


def test_parquet_gives_its_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=7)
    records = Records([tmp_path])
    assert [records[i][1] for i in range(len(records))] == ROWS
    assert read_pieces([str(tmp_path / "a.parquet")]) == [row["text"] + "\n" for row in ROWS]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"b.parquet is not a complete Parquet file"):
        Records([tmp_path / "b.parquet"])
    parquet.write_table(pyarrow.table({"a": []}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet: has no rows"):
        Records([tmp_path / "c.parquet"])


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'pip install "elastic-lm\[parquet\]"'):
        Records([tmp_path / "a.parquet"])


def test_patterns_name_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "deep/er/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    ends = (".jsonl",)
    assert [f.name for f in find_files([f"{tmp_path}/*.jsonl"], ends)] == ["a.jsonl", "b.jsonl"]
    deep = find_files([f"{tmp_path}/**/*.jsonl"], ends)
    assert sorted(f.name for f in deep) == ["a.jsonl", "b.jsonl", "d.jsonl"]
    assert [f.name for f in find_files([f"{tmp_path}/[bc].*"], ends)] == ["b.jsonl", "c.txt"]
    with pytest.raises(FileNotFoundError, match=r"\*.csv: no file matches this pattern"):
        find_files([f"{tmp_path}/*.csv"], ends)
    # A name is a name, whatever it looks like.
    (tmp_path / "[b].jsonl").write_text("{}")
    assert [f.name for f in find_files([f"{tmp_path}/[b].jsonl"], ends)] == ["[b].jsonl"]

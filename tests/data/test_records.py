"""Records of JSON lines and tables: what is read, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest

from elastic_lm.data.records import Records, text_of


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


ROWS = [{"sentence": 'a "quoted", one', "label": "1"}, {"sentence": "zwei\tTabs: no", "label": "0"}]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_all_formats_give_the_same_records(tmp_path: Path, packed: str) -> None:
    rows = [{**row, "sentence": row["sentence"].replace("\t", " ")} for row in ROWS]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    csv = 'sentence,label\r\n"a ""quoted"", one",1\r\nzwei Tabs: no,0\r\n'
    tsv = 'sentence\tlabel\na "quoted", one\t1\nzwei Tabs: no\t0\n'
    for name, text in {"a.jsonl": lines, "a.csv": "\ufeff" + csv, "a.tsv": tsv}.items():
        file = write(tmp_path / f"{name}{packed}", text)
        found = Records([file])
        assert [found[i][1] for i in range(len(found))] == rows
        assert found[1][0].startswith(str(file))
    assert len(Records([tmp_path])) == 6


def test_texts_of_fields() -> None:
    record = {"text": "a", "flag": True, "number": 0.5, "none": None}
    assert [text_of("x", record, f) for f in ("text", "flag", "number")] == ["a", "true", "0.5"]
    for field in ("none", "other"):
        with pytest.raises(ValueError, match=f"f line 3 has no text under '{field}'; found: text, flag"):
            text_of("f line 3", record, field)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a,b\n1\n", "line 2: does not have the 2 fields"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: does not have the 2 fields"),
        ("a.tsv", "a\ta\n1\t2\n", "names a field twice"),
        ("a.csv", "a,b\n", "no records in it"),
        ("a.jsonl", "\n\n", "no records in it"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl.gz", "", "no records in it|is empty"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Records([write(tmp_path / name, text)])


@pytest.mark.parametrize(("line", "message"), [("[1]", "list is not a JSON object"), ("{", "is not JSON")])
def test_unusable_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    records = Records([write(tmp_path / "a.jsonl", f'{{"a": "b"}}\n{line}\n')])
    with pytest.raises(ValueError, match=f"a.jsonl line 2.*{message}"):
        records[1]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: does not exist"):
        Records([tmp_path / "nowhere.jsonl"])

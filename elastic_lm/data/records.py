"""Records of JSON lines, CSV and TSV files, read one by one."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_lm.config.parse import parse_json
from elastic_lm.data.sources import find_files, json_lines, read_bytes

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
Record = Mapping[str, Any]


class Records:
    """A random-access sequence of (where it stands, its fields) over files of one kind or several."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        """Finds the records; a line that is no JSON object raises ValueError when it is read.

        Args:
          paths: files (.jsonl, .csv, .tsv, each also .gz; any other name is read as JSON lines) or folders
            with such files. The first row of a table names its fields.

        Raises:
          FileNotFoundError: a path does not exist, or a folder has no such file.
          ValueError: a file is empty or not a gzip file, or a table has no rows or repeats a name.
        """
        files = find_files(paths, (*JSON_SUFFIXES, *TABLE_SUFFIXES))
        self._rows: list[Any] = []
        for file in files:
            table = file.name.endswith(TABLE_SUFFIXES)
            self._rows += _table(file) if table else json_lines(file)
        if not self._rows:
            raise ValueError(f"{', '.join(map(str, files))}: no records in it")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> tuple[str, Record]:
        row = self._rows[index]
        if isinstance(row[1], dict):
            return row
        file, number, start, stop = row
        where = f"{file} line {number}"
        try:
            value = parse_json(bytes(read_bytes(file)[start:stop]))
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {type(value).__name__} is not a JSON object: write one per line")
        return where, value


def text_of(where: str, record: Record, field: str) -> str:
    """The text under a field; numbers are written out.

    Args:
      where: names the record in messages.
      record: its fields.
      field: the key.

    Raises:
      ValueError: there is no such field, or it holds no text.
    """
    value = record.get(field)
    if isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where} has no text under {field!r}; found: {', '.join(record)}")
    return value


def _table(file: Path) -> list[tuple[str, dict[str, str]]]:
    """Rows of a comma- or tab-separated file."""
    text = io.StringIO(bytes(read_bytes(file)).decode("utf-8-sig", errors="replace"), newline="")
    tabs = file.name.endswith((".tsv", ".tsv.gz"))
    style: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.DictReader(text, **style)
    names = list(reader.fieldnames or [])
    if len(set(names)) < len(names):
        raise ValueError(f"{file}: its first row {names} names a field twice; rename one")
    rows = []
    try:
        for row in reader:
            where = f"{file} line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: does not have the {len(names)} fields {names}")
            rows.append((where, row))
    except csv.Error as error:
        raise ValueError(f"{file} line {reader.line_num} is not CSV: {error}") from error
    return rows

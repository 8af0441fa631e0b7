"""Records of JSON lines, CSV and TSV files, read one by one."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_lm.config.data import RECORD_SUFFIXES
from elastic_lm.data.sources import find_files, read_text, record_at, record_places
from elastic_lm.files.text_files import check_whole

TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
# How missing values are written, in any case, with a sign or not; "none" may be the name of a class.
MISSING = ("nan", "inf", "infinity", "null", "<na>", "n/a")
PYTHON_NONE = "None"
WITH_FRACTION = re.compile(r"[+-]?[0-9]+\.0+")
FRACTION = re.compile(r"[+-]?[0-9]+\.[0-9]+")
Record = Mapping[str, Any]


class Records:
    """A random-access sequence of (where it stands, its fields) over files of one kind or several."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        """Finds the records; a line that is no JSON object raises ValueError when it is read.

        Args:
          paths: files (.jsonl, .json, .csv, .tsv, each also .gz, .parquet; any other name is read as JSON
            lines or a JSON array), folders with such files, or patterns of their names. The first row of a
            table names its fields.

        Raises:
          FileNotFoundError: a path does not exist, or a folder has no such file.
          ValueError: a file is empty or not a gzip file, or a table has no rows or repeats a name.
        """
        files = find_files(paths, (*RECORD_SUFFIXES, *TABLE_SUFFIXES))
        self._rows: list[Any] = []
        self._files: list[Path] = []  # of every row
        for file in files:
            table = file.name.lower().endswith(TABLE_SUFFIXES)
            found = _table(file) if table else record_places(file)
            self._rows += found
            self._files += [file] * len(found)
        if not self._rows:
            raise ValueError(f"{', '.join(map(str, files))}: no records in it")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> tuple[str, Record]:
        row = self._rows[index]
        return row if isinstance(row[1], dict) else record_at(row)

    def file_of(self, index: Any) -> Path:
        """The file of a record."""
        return self._files[index]


def text_of(where: str, record: Record, field: str) -> str:
    """The text under a field; numbers are written out.

    Args:
      where: names the record in messages.
      record: its fields.
      field: the key.

    Raises:
      ValueError: there is no such field, or it holds no text: null, NaN and infinity are none.
    """
    value = record.get(field)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{where} has {value} under {field!r}, which stands for a missing value; leave the record out"
        )
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where} has no text under {field!r}; found: {', '.join(record)}")
    return check_whole(f"{where}: {field}", value)


def label_of(where: str, record: Record, field: str) -> str:
    """The name of a class under a field: `text_of` without white space around it.

    Whole numbers have no fraction: 1 and 1.0 are one name.

    Raises:
      ValueError: there is no such field, or it holds no name, such as an empty text.
    """
    name = text_of(where, record, field).strip()
    if isinstance(record[field], float):
        name = _plain_number(name)
    if not name:
        raise ValueError(f"{where} has an empty {field!r}; give the name of a class, or leave the record out")
    return name


def class_number(name: str, classes: Sequence[str]) -> int | None:
    """The number of the class of this name; None = there is no such class.

    A name that is a whole number also finds its class where one of the two is written with a fraction of
    zeros: 1 and 1.0 are one class. 1.1 and 1.10, which may be versions, are not.
    """
    if name in classes:
        return classes.index(name)
    plain = _plain_number(name)
    found = [i for i, other in enumerate(classes) if _plain_number(other) == plain]
    return found[0] if len(found) == 1 else None


def class_names(found: Mapping[str, str]) -> tuple[str, ...]:
    """The names of classes in the order of their numbers: numbers by their values, then texts.

    The order depends on nothing but the names, so that it is the same in every process.

    Args:
      found: every name that a file holds -> where, for messages.

    Raises:
      ValueError: a name stands for a missing value, or two names are one number.
    """
    for name, where in found.items():
        if name == PYTHON_NONE or name.lower().lstrip("+-") in MISSING:
            raise ValueError(
                f"{where}: the label {name!r} stands for a missing value; leave the record out, or name the "
                "classes in task.labels if it is one"
            )
    names = sorted(found, key=_number_first)
    by_number: dict[str, str] = {}
    for name in names:
        plain = name.rstrip("0") if FRACTION.fullmatch(name) and not WITH_FRACTION.fullmatch(name) else name
        other = by_number.setdefault(_plain_number(plain), name)
        if other != name:
            raise ValueError(
                f"{found[name]}: the label {name!r} and the label {other!r} of {found[other]} are one "
                "number; write it in one way"
            )
    return tuple(names)


def _plain_number(name: str) -> str:
    """A whole number without a fraction of zeros; any other name as it is."""
    if not WITH_FRACTION.fullmatch(name):
        return name
    whole = name.split(".")[0]
    return "0" if whole == "-0" else whole


def _number_first(name: str) -> tuple[float, str]:
    """A key by which any two names are in order."""
    try:
        value = float(name)
    except ValueError:
        value = math.inf
    return value if math.isfinite(value) else math.inf, name


def _table(file: Path) -> list[tuple[str, dict[str, str]]]:
    """Rows of a comma- or tab-separated file."""
    # Lines end at newlines alone; a carriage return before one is dropped by the reader.
    text = io.StringIO(read_text(file).decode(), newline="\n")
    tabs = file.name.lower().endswith((".tsv", ".tsv.gz"))
    style: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.DictReader(text, **style)
    try:
        names = list(reader.fieldnames or [])
    except csv.Error as error:
        raise ValueError(
            f"{file} line 1 is not CSV: {error}; its lines must end at newlines, and name the fields first"
        ) from error
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

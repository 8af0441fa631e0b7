"""Random-access sources of documents: text files, JSON lines, and prompts with responses."""

import functools
import glob
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elastic_lm.data import json_arrays, parquet
from elastic_lm.files.local import local_path
from elastic_lm.files.remote import is_remote, remote_files
from elastic_lm.files.text_files import Bytes, check_whole, is_packed, open_bytes, parse_object, text_start


class Document(NamedTuple):
    """A piece of text to learn from.

    Attributes:
      prompt: read, not learned.
      text: learned.
      starts: the piece begins a document.
      ends: the piece ends a document.
      name: where it comes from, for messages.
    """

    prompt: str
    text: str
    starts: bool
    ends: bool
    name: str


class RecordPlace(NamedTuple):
    """Where a record stands.

    Attributes:
      file: that it is in.
      what: "line", "record" of an array, or "row" of a table.
      number: of the line or record, from 1; of the row, from 0.
      start: first byte.
      stop: one past the last byte.
    """

    file: Path
    what: str
    number: int
    start: int
    stop: int


def find_files(paths: Iterable[str | Path], suffixes: Sequence[str]) -> list[Path]:
    """Files named by `paths`, and those with one of `suffixes` in the folders among them.

    Args:
      paths: files, of any name, folders, read at any depth, and patterns of names such as data/*.jsonl, in
        which ** stands for any folders. They may be remote: copies are given then, kept until the object
        changes.
      suffixes: how the names of files in folders end.

    Returns:
      The files in the order of `paths`, sorted within a folder or a pattern.

    Raises:
      FileNotFoundError: a path does not exist, or a folder has no such file.
      ValueError: remote paths of this kind are not supported.
    """
    files: list[Path] = []
    for path in (one for given in paths for one in _places(given, suffixes)):
        if path.is_file():
            files.append(path)
            continue
        named = (p for p in path.rglob("*") if p.name.lower().endswith(tuple(suffixes)))
        found = sorted(p for p in named if p.is_file())
        if not found:
            reason = f"no file ending in {', '.join(suffixes)} in it" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"data path {path}: {reason}")
        files.extend(found)
    return files


def _places(given: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """Files and folders that one of the paths stands for; copies of what is in a store."""
    return remote_files(given, suffixes) if is_remote(given) else _matching(local_path(given))


def _matching(path: Path) -> list[Path]:
    """What a pattern stands for; a path that is there, or that is no pattern, as it is.

    Raises:
      FileNotFoundError: nothing matches.
    """
    if not glob.has_magic(str(path)) or path.exists():
        return [path]
    found = sorted(Path(one) for one in glob.glob(str(path.expanduser()), recursive=True))
    if not found:
        raise FileNotFoundError(f"data path {path}: no file matches this pattern")
    return found


class TextBytes(NamedTuple):
    """What a text file holds; safe to slice from threads.

    Attributes:
      data: UTF-8, unpacked if the file is packed, else mapped.
      start: where the text begins in it, after a byte order mark.
    """

    data: Bytes
    start: int

    def decode(self) -> str:
        """The whole text."""
        return bytes(self.data[self.start :]).decode()


def read_text(path: Path) -> TextBytes:
    """The bytes of a text file, checked and kept until it changes.

    Raises:
      ValueError: the file is empty, holds no UTF-8 text, or is packed and damaged.
    """
    status = path.stat()
    return _read_version(path, status.st_mtime_ns, status.st_size)


# Where the text begins in files as they were at a time; they are not checked again when mapped again.
_starts: dict[tuple[Path, int, int], int] = {}


@functools.lru_cache(maxsize=256)
def _read_version(path: Path, modified: int, size: int) -> TextBytes:
    """A file as it was at this time."""
    with open_bytes(path) as file:
        mapped = size and not is_packed(path)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else file.read()
    key = path, modified, size
    if key not in _starts:
        _starts[key] = text_start(path, data)
    start = _starts[key]
    if start == len(data):
        raise ValueError(f"{path} is empty: remove it from the data paths")
    return TextBytes(data, start)


class TextFiles:
    """Text files, cut at line ends into pieces of about `span` bytes."""

    def __init__(self, files: Sequence[Path], span: int) -> None:
        """Finds where the pieces begin and end.

        Args:
          files: UTF-8 text, plain or .gz.
          span: bytes, at least, of every piece but a file's last one.

        Raises:
          ValueError: see `read_text`.
        """
        self._pieces = [(file, *bounds) for file in files for bounds in _cut(read_text(file), span)]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: Any) -> Document:
        file, start, stop = self._pieces[index]
        data, first = read_text(file)
        text = bytes(data[start:stop]).decode()
        return Document("", text, start == first, stop == len(data), f"{file}:{start}")

    def file_of(self, index: Any) -> Path:
        """The file of a piece."""
        return self._pieces[index][0]


class JsonLines:
    """Records, such as lines of JSON, with the text under one key or the prompt and response under two."""

    def __init__(self, files: Sequence[Path], text_field: str, prompt_field: str = "") -> None:
        """Finds the lines; a line that is no JSON object with these keys raises ValueError when it is read.

        Args:
          files: JSON lines or a JSON array, plain or .gz, or Parquet; blank lines are skipped.
          text_field: key of what is learned.
          prompt_field: key of what is read before it, not learned; "" = none.

        Raises:
          ValueError: see `read_text`.
        """
        self._fields = (prompt_field, text_field) if prompt_field else (text_field,)
        self._lines = [place for file in files for place in record_places(file)]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Document:
        where, record = record_at(self._lines[index])
        values = [_text(where, record, field) for field in self._fields]
        prompt, text = values if len(values) == 2 else ("", values[0])
        return Document(prompt, text, True, True, where)

    def file_of(self, index: Any) -> Path:
        """The file of a record."""
        return self._lines[index].file


def record_places(file: Path) -> list[RecordPlace]:
    """Where the records of a file stand: Parquet, a JSON array, or JSON lines.

    Raises:
      ValueError: see `read_text` and `json_lines`; or it is no complete file of its kind.
    """
    if parquet.is_parquet(file):
        return [RecordPlace(file, "row", i, 0, 0) for i in range(parquet.row_count(file))]
    text = read_text(file)
    if json_arrays.is_array(text.data, text.start):
        places = json_arrays.array_places(file, text.data, text.start)
        return [RecordPlace(file, "record", *place) for place in places]
    return [RecordPlace(file, "line", *rest) for _, *rest in json_lines(file)]


def record_at(place: RecordPlace) -> tuple[str, dict[str, Any]]:
    """(where it stands, for messages; its fields) of a record.

    Raises:
      ValueError: it is no JSON object; names it.
    """
    where = f"{place.file} {place.what} {place.number}"
    if place.what == "row":
        return where, parquet.row(place.file, place.number)
    return where, parse_object(where, read_text(place.file).data[place.start : place.stop])


def _text(where: str, record: dict[str, Any], field: str) -> str:
    """The text under a field."""
    value = record.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{where} has no text under {field!r}; found: {', '.join(record)}")
    return check_whole(f"{where}: {field}", value)


def _cut(text: TextBytes, span: int) -> list[tuple[int, int]]:
    """Bounds of pieces that end at line ends, each at least `span` bytes long but the last."""
    data, start = text
    bounds = []
    while start < len(data):
        newline = data.find(b"\n", start + span - 1)
        stop = newline + 1 if newline >= 0 else len(data)
        bounds.append((start, stop))
        start = stop
    return bounds


def json_lines(file: Path) -> list[tuple[Path, int, int, int]]:
    """(file, line number from 1, start, stop) of every line that is not blank.

    Raises:
      ValueError: see `read_text`.
    """
    text = read_text(file)
    data = np.frombuffer(text.data, np.uint8)
    ends = np.append(np.flatnonzero(data == ord("\n")), len(data))
    starts = np.append(text.start, ends[:-1] + 1)
    rows = zip(starts.tolist(), ends.tolist(), strict=True)
    return [(file, i, a, b) for i, (a, b) in enumerate(rows, 1) if data[a:b].tobytes().strip()]

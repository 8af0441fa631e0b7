"""Random-access sources of documents: text files, JSON lines, and prompts with responses."""

import functools
import gzip
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elastic_lm.config.parse import parse_json
from elastic_lm.files.local import local_path


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


def find_files(paths: Iterable[str | Path], suffixes: Sequence[str]) -> list[Path]:
    """Files named by `paths`, and those with one of `suffixes` in the folders among them.

    Args:
      paths: files, of any name, and folders, read at any depth.
      suffixes: how the names of files in folders end.

    Returns:
      The files in the order of `paths`, sorted within a folder.

    Raises:
      FileNotFoundError: a path does not exist, or a folder has no such file.
      ValueError: a path names another machine.
    """
    files: list[Path] = []
    for path in map(local_path, paths):
        if path.is_file():
            files.append(path)
            continue
        found = sorted(p for p in path.rglob("*") if p.name.endswith(tuple(suffixes)) and p.is_file())
        if not found:
            reason = f"no file ending in {', '.join(suffixes)} in it" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"data path {path}: {reason}")
        files.extend(found)
    return files


def read_bytes(path: Path) -> bytes | mmap.mmap:
    """Contents of a file, unpacked if its name ends in .gz, else mapped; safe to slice from threads.

    Raises:
      ValueError: the file is empty or not a gzip file.
    """
    status = path.stat()
    return _read_version(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _read_version(path: Path, modified: int, size: int) -> bytes | mmap.mmap:
    """Contents of a file, kept until it changes."""
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(path.read_bytes())
        else:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    if not len(data):
        raise ValueError(f"{path} is empty: remove it from the data paths")
    return data


class TextFiles:
    """Text files, cut at line ends into pieces of about `span` bytes."""

    def __init__(self, files: Sequence[Path], span: int) -> None:
        """Finds where the pieces begin and end.

        Args:
          files: UTF-8 text, plain or .gz.
          span: bytes, at least, of every piece but a file's last one.

        Raises:
          ValueError: a file is empty or not a gzip file.
        """
        self._pieces = [(file, *bounds) for file in files for bounds in _cut(read_bytes(file), span)]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: Any) -> Document:
        file, start, stop = self._pieces[index]
        data = read_bytes(file)
        text = bytes(data[start:stop]).decode("utf-8", errors="replace")
        return Document("", text, start == 0, stop == len(data), f"{file}:{start}")


class JsonLines:
    """One JSON object per line, with the text under one key or the prompt and response under two."""

    def __init__(self, files: Sequence[Path], text_field: str, prompt_field: str = "") -> None:
        """Finds the lines; a line that is no JSON object with these keys raises ValueError when it is read.

        Args:
          files: JSON lines, plain or .gz; blank lines are skipped.
          text_field: key of what is learned.
          prompt_field: key of what is read before it, not learned; "" = none.

        Raises:
          ValueError: a file is empty or not a gzip file.
        """
        self._fields = (prompt_field, text_field) if prompt_field else (text_field,)
        self._lines = [line for file in files for line in json_lines(file)]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Document:
        file, number, start, stop = self._lines[index]
        values = [self._value(f"{file} line {number}", file, start, stop, field) for field in self._fields]
        prompt, text = values if len(values) == 2 else ("", values[0])
        return Document(prompt, text, True, True, f"{file} line {number}")

    def _value(self, where: str, file: Path, start: int, stop: int, field: str) -> str:
        try:
            value = parse_json(bytes(read_bytes(file)[start:stop]))
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            keys = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{where} has no text under {field!r}; found: {keys}")
        return value[field]


def _cut(data: bytes | mmap.mmap, span: int) -> list[tuple[int, int]]:
    """Bounds of pieces that end at line ends, each at least `span` bytes long but the last."""
    bounds, start = [], 0
    while start < len(data):
        newline = data.find(b"\n", start + span - 1)
        stop = newline + 1 if newline >= 0 else len(data)
        bounds.append((start, stop))
        start = stop
    return bounds


def json_lines(file: Path) -> list[tuple[Path, int, int, int]]:
    """(file, line number from 1, start, stop) of every line that is not blank.

    Raises:
      ValueError: the file is empty or not a gzip file.
    """
    data = np.frombuffer(read_bytes(file), np.uint8)
    ends = np.append(np.flatnonzero(data == ord("\n")), len(data))
    starts = np.append(0, ends[:-1] + 1)
    rows = zip(starts.tolist(), ends.tolist(), strict=True)
    return [(file, i, a, b) for i, (a, b) in enumerate(rows, 1) if data[a:b].tobytes().strip()]

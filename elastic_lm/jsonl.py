"""JSON lines: rows read as a stream, and an output file that a killed run goes on with."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from elastic_lm.plain import read_json, require, write_text_whole

CHUNK = 1 << 16


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one at a time.

    Args:
      path: JSON lines, plain or .gz; blank lines are skipped.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line holds no JSON object; names it.
    """
    for where, line in _lines(Path(path)):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}); write one object per line") from error
        require(isinstance(row, dict), where, line[:80].decode(errors="replace"), "must be a JSON object")
        yield row


def count_rows(path: str | Path) -> int:
    """How many rows `read_rows` gives, without reading them."""
    return sum(1 for _ in _lines(Path(path)))


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path} line {number}", line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete gzip file: {error}") from error


class Journal:
    """An output of one JSON line per row, in order, that survives the end of its process.

    Lines are appended in batches and synchronised to the disk. What a killed process left half written is
    dropped when the file is opened again, and the run goes on after the last whole line. With a name that
    ends in .gz every batch is a gzip member of its own. FILE.run.json says what the run is; another run is
    refused.

    Attributes:
      rows: whole lines in the file.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Opens the file, or goes on with it.

        Args:
          path: the output.
          settings: JSON values that name the run.

        Raises:
          OSError: the file cannot be written.
          ValueError: it holds something else, or another run's lines.
        """
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._packed = self._path.suffix == ".gz"
        self.rows, end = 0, 0
        if self._path.exists() and self._path.stat().st_size:
            self._check(settings)
            self.rows, end = self._whole()
        else:
            write_text_whole(self._settings_path, json.dumps(dict(settings), indent=2) + "\n")
        self._file = self._path.open("ab")
        self._file.truncate(end)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes lines for the next rows, whose `index` says which they are; on the disk when it returns."""
        if not records:
            return
        text = "".join(json.dumps(record, default=_plain) + "\n" for record in records).encode()
        self._file.write(gzip.compress(text) if self._packed else text)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows += len(records)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def _settings_path(self) -> Path:
        return self._path.with_name(self._path.name + ".run.json")

    def _check(self, settings: Mapping[str, Any]) -> None:
        other = "choose another path, or remove it to begin again"
        if not self._settings_path.is_file():
            raise ValueError(f"{self._path}: exists and was not written by a run like this; {other}")
        found = read_json(self._settings_path)
        for key, value in settings.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{self._path}: was begun with {key}={found.get(key)!r}, now {key}={value!r}; {other}"
                )

    def _whole(self) -> tuple[int, int]:
        """(whole lines, bytes up to where they end)."""
        rows = end = 0
        with self._path.open("rb") as file:
            for text, stop in _members(file) if self._packed else _whole_lines(file):
                for line in text.splitlines():
                    if _index(line) != rows:
                        raise ValueError(f"{self._path}: row {rows} is damaged or missing; remove the file")
                    rows += 1
                end = stop
        return rows, end


def _plain(value: Any) -> Any:
    """Arrays and their numbers as lists and numbers; anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _index(line: bytes) -> Any:
    try:
        return json.loads(line)["index"]
    except (ValueError, LookupError, TypeError):
        return None


def _whole_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Lines that end, and where they do."""
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield line, end


def _members(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Contents of whole gzip members, and where these end."""
    end, rest = 0, b""
    while True:
        unpack, parts, used = zlib.decompressobj(wbits=31), [], 0
        while not unpack.eof:
            chunk = rest or file.read(CHUNK)
            rest = b""
            try:
                parts.append(unpack.decompress(chunk))
            except zlib.error:
                return
            if not chunk:
                return
            used += len(chunk)
        rest = unpack.unused_data
        end += used - len(rest)
        yield b"".join(parts), end

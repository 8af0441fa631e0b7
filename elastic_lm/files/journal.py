"""JSON lines: records read as a stream, and an output file that a killed run continues."""

import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from elastic_lm.config.checks import require
from elastic_lm.config.parse import parse_json
from elastic_lm.files.atomic import (
    append_whole,
    naming,
    new_beside,
    read_json,
    real_place,
    remove_leftovers,
    write_text_whole,
)
from elastic_lm.files.local import local_path, require_folder_above
from elastic_lm.files.locks import try_lock
from elastic_lm.files.remote import fetched
from elastic_lm.files.text_files import BYTE_ORDER_MARK, is_packed, open_bytes, parse_object
from elastic_lm.files.unfinished import finishing, unfinished

CHUNK = 1 << 16  # bytes that are read at once
REWRITTEN = 1024  # lines that are written at once where a file is written anew


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one at a time.

    Args:
      path: JSON lines, plain or .gz; blank lines are skipped.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line holds no JSON object; names it.
    """
    for where, line in _lines(fetched(path)):
        yield parse_object(where, line)


def count_records(path: str | Path) -> int:
    """How many records a file holds, counted without parsing them."""
    return sum(1 for _ in _lines(fetched(path)))


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines that are not blank, each with its place for a message."""
    with open_bytes(path, whole=False) as file:
        for number, line in enumerate(file, 1):
            line = line if number > 1 else line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                yield f"{path} line {number}", line


class Journal:
    """An output of one JSON line per record, in order, that survives the end of its process.

    Lines are appended in batches and synchronised to the disk. When the file is opened again, the run goes on
    after the longest beginning whose records are all there: a line that a killed process left half written is
    dropped, and a damaged line with everything after it. If the file's name ends in .gz, every batch is a
    gzip member of its own. FILE.run.json says which run the file belongs to. Another run is refused, and so
    is a second process.

    Attributes:
      records: number of whole lines in the file.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Opens the file, or goes on with it.

        Args:
          path: the output.
          settings: JSON values that name the run.

        Raises:
          OSError: the file cannot be written.
          ValueError: it holds something else, or another run's lines, or another process has it open.
        """
        self._path = local_path(path)
        require_folder_above(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._packed = is_packed(self._path)
        self._broken = False

        self._file = _locked(self._path)
        try:
            remove_leftovers(real_place(self._path))
            # Settings that have been through JSON compare with those of a file: tuples have become lists.
            self.records = self._begin(json.loads(json.dumps(dict(settings))))
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes the next records. They are on the disk when this returns.

        Args:
          records: the lines; the field `index` of each says which record it is.

        Raises:
          OSError: they cannot be written.
          ValueError: an earlier write failed, so that it is unknown what the file holds.
        """
        if not records:
            return
        require(
            not self._broken,
            "journal",
            str(self._path),
            "an earlier write failed; open the file again, which finds out what it holds",
        )

        # The file counts as broken until all of it is on the disk: an interrupt may come at any point.
        self._broken = True
        with naming(self._path):
            _write(self._file, self._bytes(records))
        self.records += len(records)
        self._broken = False

    def lines(self) -> Iterator[dict[str, Any]]:
        """The records that were written, in order."""
        return read_records(self._path)

    def replace(self, records: Mapping[int, Mapping[str, Any]]) -> None:
        """Writes the file anew with other lines for some of its records. It changes at once or not at all.

        Args:
          records: the new lines, by `index`.
        """
        path = real_place(self._path)
        partial = new_beside(path)

        # The new file is locked before it takes the old one's name, so that no process can come between.
        with naming(self._path, partial), unfinished(partial):
            file, batch = _locked(partial, new=True), []
            try:
                for line in self.lines():
                    batch.append(records.get(line["index"], line))
                    if len(batch) == REWRITTEN:
                        _write(file, self._bytes(batch))
                        batch = []
                _write(file, self._bytes(batch))
                with finishing(partial):
                    partial.replace(path)
            except BaseException:
                file.close()
                raise

        self._file.close()
        self._file = file

    def close(self) -> None:
        """Closes the file, and removes it where nothing was written to it."""
        if not os.fstat(self._file.fileno()).st_size:
            for path in (self._path, self._settings_path):
                path.unlink(missing_ok=True)
        self._file.close()

    @property
    def _settings_path(self) -> Path:
        return self._path.with_name(self._path.name + ".run.json")

    def _begin(self, settings: dict[str, Any]) -> int:
        """Refuses another run's file, truncates a damaged tail, returns the number of whole records."""
        if not self._path.stat().st_size:
            write_text_whole(self._settings_path, json.dumps(settings, indent=2) + "\n")
            return 0

        self._check(settings)
        records, end, after = self._whole()
        if after:
            print(
                f"{self._path}: row {records} is damaged or out of place: it and what follows it, "
                f"{after} lines, are done again",
                file=sys.stderr,
            )
        self._file.truncate(end)
        return records

    def _check(self, settings: dict[str, Any]) -> None:
        """Checks that the file belongs to a run with these settings."""
        other = "choose another path, or remove it to begin again"
        if not self._settings_path.is_file():
            raise ValueError(f"{self._path}: exists and was not written by a run like this; {other}")

        found = read_json(self._settings_path)
        for key in [*settings, *(key for key in found if key not in settings)]:
            old, new = found.get(key), settings.get(key)
            if old != new:
                raise ValueError(f"{self._path}: was begun with {key}={old!r}, now {key}={new!r}; {other}")

    def _whole(self) -> tuple[int, int, int]:
        """(records in sequence from the first, bytes up to where they end, whole lines after that)."""
        records = end = after = 0
        with self._path.open("rb") as file:
            for text, stop in _members(file) if self._packed else _whole_lines(file):
                lines = text.splitlines()
                right = all(_index(line) == records + i for i, line in enumerate(lines))
                if after or not right:
                    after += len(lines)
                else:
                    records, end = records + len(lines), stop
        return records, end, after

    def _bytes(self, records: Sequence[Mapping[str, Any]]) -> bytes:
        text = "".join(json.dumps(record, default=_plain) + "\n" for record in records).encode()
        return gzip.compress(text) if self._packed and records else text


def _locked(path: Path, new: bool = False) -> FileIO:
    """Opens a file to append to, without a buffer, and locks it against other processes.

    Args:
      path: the file.
      new: nothing may lie there yet, not even a link.

    Raises:
      ValueError: another process writes it.
    """
    only_new = os.O_EXCL if new else 0
    file = FileIO(path, "ab", opener=lambda path, flags: os.open(path, flags | only_new, 0o666))
    locked = try_lock(file.fileno())
    same = os.path.samestat(os.fstat(file.fileno()), path.stat())  # not replaced in between
    if locked is False or not same:
        file.close()
        raise ValueError(f"{path}: another process is writing it; wait for its end, or choose another path")
    return file


def _write(file: FileIO, data: bytes) -> None:
    """Writes all of the data, or nothing, and waits until it is on the disk."""
    append_whole(file, data)
    os.fsync(file.fileno())


def _plain(value: Any) -> Any:
    """Arrays and their numbers as lists and numbers; anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _index(line: bytes) -> Any:
    """Which record a line holds; None where it holds none."""
    try:
        return parse_json(line)["index"]
    except (ValueError, LookupError, TypeError):
        return None


def _whole_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Lines that are complete, each with the offset of its end."""
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield line, end


def _members(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Contents of complete gzip members, each with the offset of its end."""
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

        # The last chunk may hold the beginning of the next member.
        rest = unpack.unused_data
        end += used - len(rest)
        yield b"".join(parts), end

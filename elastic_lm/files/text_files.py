"""Text files, plain or packed by gzip: unpacked within a bound, checked to be UTF-8, split at newlines alone.

A byte order mark at the beginning of a file is no part of its text. Characters that some programs take for
line ends, such as U+2028, U+0085 and form feeds, stay in the text.
"""

import codecs
import gzip
import io
import mmap
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from elastic_lm.config.parse import parse_json
from elastic_lm.files.remote import fetched

PACKED = ".gz"  # how the name of a packed file ends
BYTE_ORDER_MARK = codecs.BOM_UTF8
UNPACKED = 64 << 20  # bytes that every packed file may unpack to
RATIO = 100  # times its size that a larger one may unpack to; text reaches about 10
IN_MEMORY = 8 << 30  # bytes that no packed file may exceed, because they are held in memory
CHUNK = 1 << 20  # bytes that are checked at once

Bytes = bytes | mmap.mmap

# How files begin that are no text though they may hold some, and what to do with them.
OTHER_FORMATS = {
    b"\x1f\x8b": "packed by gzip: end its name in .gz",
    b"BZh": "packed by bzip2: unpack it first",
    b"\xfd7zXZ": "packed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it first",
    b"PK\x03\x04": "a zip file: unpack it first",
    b"PAR1": "a Parquet file: end its name in .parquet, and read it as records",
    codecs.BOM_UTF16_LE: "UTF-16: convert it first, for example with `iconv -f UTF-16 -t UTF-8`",
    codecs.BOM_UTF16_BE: "UTF-16: convert it first, for example with `iconv -f UTF-16 -t UTF-8`",
}
CONVERT = "convert it first, for example with `iconv -f LATIN1 -t UTF-8` from the encoding that it is in"


def is_packed(path: str | Path) -> bool:
    """Whether a file is unpacked where it is read, which its name decides."""
    return str(path).lower().endswith(PACKED)


def open_bytes(path: Path, whole: bool = True) -> BinaryIO:
    """Opens a file to read its bytes, unpacked if it is packed.

    Reading raises ValueError where a packed file is damaged, or unpacks to far more than text does.

    Args:
      path: the file.
      whole: all of it will be held in memory; False = it is read piece by piece, however large it is.

    Raises:
      OSError: the file cannot be opened.
    """
    return io.BufferedReader(_Unpacked(path, whole), CHUNK) if is_packed(path) else path.open("rb")


class _Unpacked(io.RawIOBase):
    """What a packed file holds."""

    def __init__(self, path: Path, whole: bool) -> None:
        self._path, self._whole, self._file = path, whole, gzip.GzipFile(path)
        size = path.stat().st_size
        self._most = min(max(UNPACKED, RATIO * size), IN_MEMORY)
        self._why = f"more than {RATIO} times its size"
        if self._most == IN_MEMORY:
            self._why = "more than is held in memory"
        self._left = self._most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._file.readinto(buffer)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{self._path} is not a complete gzip file: {error}") from error
        self._left -= count
        if self._left < 0 and self._whole:
            raise ValueError(
                f"{self._path}: unpacks to more than {self._most:,} bytes, {self._why}; if it is text all "
                "the same, unpack it and name the plain file"
            )
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def text_start(path: str | Path, data: Bytes) -> int:
    """Checks that a file holds UTF-8 text.

    Args:
      path: names the file in messages.
      data: what it holds, unpacked.

    Returns:
      Where the text begins: after a byte order mark.

    Raises:
      ValueError: it holds something else, such as UTF-16, Latin-1 or a binary format; names the line.
    """
    # A NUL is valid UTF-8, but stands in binary files, and between the letters of UTF-16.
    place = data.find(b"\0")
    place = _first_foreign(data) if place < 0 else place
    if place < 0:
        return len(BYTE_ORDER_MARK) if data[: len(BYTE_ORDER_MARK)] == BYTE_ORDER_MARK else 0

    for beginning, what in OTHER_FORMATS.items():
        if data[: len(beginning)] == beginning:
            raise ValueError(f"{path}: is not UTF-8 text but {what}")
    found = f"line {_line_of(data, place)} holds the byte 0x{data[place]:02x}"
    binary = "it is a binary file, or UTF-16 or UTF-32; convert it first, or leave it out"
    raise ValueError(f"{path}: is not UTF-8 text ({found}); {CONVERT if data[place] else binary}")


def _first_foreign(data: Bytes) -> int:
    """Where the first byte stands that is no UTF-8; -1 = nowhere."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), CHUNK):
        piece = data[start : start + CHUNK]
        pending = len(decoder.getstate()[0])  # bytes of a character that the last piece began
        try:
            decoder.decode(piece, final=start + CHUNK >= len(data))
        except UnicodeDecodeError as error:
            return start - pending + error.start
    return -1


def _line_of(data: Bytes, place: int) -> int:
    """The number of the line, from 1, that a byte stands in."""
    return 1 + sum(data[i : min(i + CHUNK, place)].count(b"\n") for i in range(0, place, CHUNK))


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file without their ends, which are newlines or Windows' pairs.

    Args:
      path: UTF-8 text, plain or .gz, on this machine or in a store.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no UTF-8 text, or damaged; names the file.
    """
    with open_bytes(fetched(path)) as file:
        data = file.read()
    text = data[text_start(path, data) :].decode()
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_object(where: str, line: bytes | str) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
      where: names the line in messages.
      line: one line of JSON lines.

    Raises:
      ValueError: it holds something else; names the line.
    """
    try:
        # Given bytes, the parser would guess at encodings.
        value = parse_json(line if isinstance(line, str) else line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error}); {CONVERT}") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); write one object per line") from error
    if not isinstance(value, dict):
        shown = line[:80] if isinstance(line, str) else line[:80].decode(errors="replace")
        raise ValueError(
            f"{where}: {type(value).__name__} is not a JSON object: write one per line, not {shown!r}"
        )
    return value


def check_whole(where: str, text: str) -> str:
    """The text, where it is complete Unicode.

    JSON can spell half of a character that needs two UTF-16 codes, which is left over where text was cut.

    Args:
      where: names the text in messages.
      text: any string.

    Raises:
      ValueError: it holds half of a character, which no tokenizer can read.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            near = text[max(error.start - 10, 0) : error.end + 10]
            raise ValueError(
                f"{where} holds half of a character near {near!r}; give complete Unicode text, for example "
                "with \\ufffd in its place"
            ) from error
    return text

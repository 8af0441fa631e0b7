"""GGUF files of the ggml project: metadata, and tensors as arrays.

The header is read here, because the reader of the package `gguf` takes seconds for a large vocabulary. Types
of tensors and their dequantisation are those of the package.
"""

import dataclasses
import functools
import importlib
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ENDING = ".gguf"
MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
FLOATS = {"F32": np.float32, "F16": np.float16, "F64": np.float64}  # BF16 is not a type of NumPy
AGAIN = "download or copy the file again"

# Types of values in the metadata.
NUMBERS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
TEXT, ARRAY = 8, 9


def is_gguf(path: Path) -> bool:
    """Whether a path is a file with the ending of GGUF."""
    return path.suffix.lower() == ENDING and path.is_file()


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a file.

    Attributes:
      kind: type of its numbers, such as F32 or Q4_K.
      shape: [out, in] for a matrix; GGUF lists the sizes the other way round.
      start: first byte in the file.
      row: bytes of one row.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    row: int


class GGUF:
    """A GGUF file: its metadata, and its tensors read one at a time.

    Attributes:
      path: of the file.
      architecture: of llama.cpp, such as "llama".
      tensors: where each lies, by name.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file.

        Raises:
          ValueError: it is no whole GGUF file, or `gguf` is not installed.
        """
        self.path = path
        try:
            self._gguf: Any = importlib.import_module("gguf")
        except ImportError as error:
            fix = "GGUF files are read by the package gguf: pip install 'elastic-lm[gguf]'"
            raise ValueError(f"{path}: {fix}") from error
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._values, self.tensors = self._header(_Cursor(self._bytes))
            self.architecture = str(self._values["general.architecture"])
        except (ValueError, LookupError, struct.error, ArithmeticError, RecursionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path}: is no GGUF file that can be read ({reason}); {AGAIN}") from error
        if (parts := self.value("split.count", 0)) not in (0, 1):
            fix = "join them first with llama.cpp's llama-gguf-split --merge"
            raise ValueError(f"{path}: is one of {parts} files that a model was split into; {fix}")

    def _header(self, cursor: "_Cursor") -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """The metadata, and where the tensors lie."""
        magic, version = cursor.take(4), cursor.number("I")
        if magic != MAGIC or version not in VERSIONS:
            raise ValueError(f"it begins with {magic!r} and version {version}, not with GGUF and 2 or 3")
        count, keys = cursor.number("Q"), cursor.number("Q")
        values = {}
        for _ in range(keys):
            key = cursor.text()
            values[key] = cursor.value(cursor.number("I"))

        found = []
        for _ in range(count):
            name, dims = cursor.text(), cursor.number("I")
            shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
            found.append(
                (name, shape, self._gguf.GGMLQuantizationType(cursor.number("I")), cursor.number("Q"))
            )
        alignment = int(values.get("general.alignment", ALIGNMENT))
        data = -(-cursor.at // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in found:
            block, size = self._gguf.GGML_QUANT_SIZES[kind]
            row = shape[-1] // block * size
            tensors[name] = Tensor(kind.name, shape, data + offset, row)
            if data + offset + math.prod(shape[:-1]) * row > len(self._bytes):
                raise ValueError(f"tensor {name!r} is cut off")
        return values, tensors

    def keys(self, prefix: str) -> list[str]:
        """The keys of the metadata that begin so."""
        return [key for key in self._values if key.startswith(prefix)]

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the metadata: a number, a text, or a list of them.

        Numbers of 32 bits are given as they were written, such as 1e-05 for 9.99999974e-06.
        """
        return self._values.get(key, default)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor: float16 as it is, all other types as float32, quantised ones dequantised.

        Raises:
          ValueError: its type cannot be dequantised; names file and tensor.
        """
        tensor = self.tensors[name]
        size = math.prod(tensor.shape[:-1]) * tensor.row
        raw = np.frombuffer(self._bytes, np.uint8, size, tensor.start)
        if tensor.kind in FLOATS:
            return raw.view(FLOATS[tensor.kind]).reshape(tensor.shape)
        kind = self._gguf.GGMLQuantizationType[tensor.kind]
        try:
            values = self._gguf.quants.dequantize(raw.reshape(*tensor.shape[:-1], tensor.row), kind)
        except Exception as error:  # its own kind, and NotImplementedError
            fix = f"its type {tensor.kind} cannot be dequantised; use a file of another type, such as Q8_0"
            raise ValueError(f"{self.path}: tensor {name!r}: {fix}") from error
        return values.reshape(tensor.shape)


class _Cursor:
    """Reads the header of a file from its beginning."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self.at = 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if self.at + size > len(self._content):
            raise ValueError("it is cut off in its header")
        self.at += size
        return self._content[self.at - size : self.at]

    def number(self, kind: str) -> int:
        """The next whole number, of a type of `struct`."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        """The next text."""
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        """The next value, of a type of the metadata."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            number = self._numbers(kind, 1)[0]
            return float(str(number)) if number.dtype == np.float32 else number.item()
        kind, count = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            return self._numbers(kind, count).tolist()
        return [self.value(kind) for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        return np.frombuffer(self.take(count * NUMBERS[kind].itemsize), NUMBERS[kind])


@functools.lru_cache(maxsize=2)
def _opened(path: Path, changed: int) -> GGUF:
    return GGUF(path)


def open_gguf(path: Path) -> GGUF:
    """Opens a file, or gives the one that was opened before.

    Raises:
      ValueError: see `GGUF`.
    """
    return _opened(path, path.stat().st_mtime_ns)

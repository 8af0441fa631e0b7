"""GGUF files of the ggml project, read by its own package `gguf`: metadata, and tensors as arrays."""

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ENDING = ".gguf"
FLOATS = {"F32": np.float32, "F16": np.float16, "F64": np.float64}  # BF16 is not a type of NumPy
AGAIN = "download or copy the file again"


def is_gguf(path: Path) -> bool:
    """Whether a path is a file with the ending of GGUF."""
    return path.suffix.lower() == ENDING and path.is_file()


class GGUF:
    """A GGUF file: its metadata, and its tensors read one at a time.

    Attributes:
      path: of the file.
      tensors: name -> what `gguf` knows about the tensor.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file.

        Raises:
          ValueError: it is no GGUF file, or `gguf` is not installed.
        """
        try:
            reader = importlib.import_module("gguf").GGUFReader
        except ImportError as error:
            fix = "GGUF files are read by the package gguf: pip install 'elastic-lm[gguf]'"
            raise ValueError(f"{path}: {fix}") from error
        try:
            self._reader = reader(path)
            self.tensors: Mapping[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}
            self.architecture = str(self.value("general.architecture"))
        except Exception as error:  # of many kinds, where a file is cut off
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path}: is no GGUF file that can be read ({reason}); {AGAIN}") from error
        self.path = path

    def keys(self, prefix: str) -> list[str]:
        """The keys of the metadata that begin so."""
        return [key for key in self._reader.fields if key.startswith(prefix)]

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the metadata: a number, a text, or a list of them.

        Numbers of 32 bits are given as they were written, such as 1e-05 for 9.99999974e-06.
        """
        field = self._reader.fields.get(key)
        if field is None:
            return default
        found = field.contents()
        if isinstance(found, float) and field.parts[field.data[0]].dtype == np.float32:
            return float(str(np.float32(found)))
        return found

    def kind(self, name: str) -> str:
        """The type of a tensor's numbers, such as F32 or Q4_K."""
        return self.tensors[name].tensor_type.name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, [out, in] for a matrix; GGUF lists the sizes the other way round."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor: float16 as it is, all other types as float32, quantised ones dequantised.

        Raises:
          ValueError: its type cannot be dequantised; names file and tensor.
        """
        tensor = self.tensors[name]
        kind = self.kind(name)
        if kind in FLOATS:
            return np.asarray(tensor.data, FLOATS[kind]).reshape(self.shape(name))
        try:
            values = importlib.import_module("gguf.quants").dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:  # its own kind, and NotImplementedError
            fix = "its type {kind} cannot be dequantised; use a file of another type, such as Q8_0 or F16"
            raise ValueError(f"{self.path}: tensor {name!r}: {fix.format(kind=kind)}") from error
        return values.reshape(self.shape(name))


@functools.lru_cache(maxsize=2)
def _opened(path: Path, changed: int) -> GGUF:
    return GGUF(path)


def open_gguf(path: Path) -> GGUF:
    """Opens a file, or gives the one that was opened before: its metadata may take seconds to read.

    Raises:
      ValueError: see `GGUF`.
    """
    return _opened(path, path.stat().st_mtime_ns)

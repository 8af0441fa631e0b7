"""The files of a Hugging Face folder: JSON and lazily read safetensors shards, with exact complaints."""

import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from elastic_lm.config.parse import parse_json
from elastic_lm.files import atomic as plain
from elastic_lm.files.remote import named
from elastic_lm.hf.layouts import Shape
from elastic_lm.models.finite import check_tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16", "F64")
LONGEST_HEADER = 100_000_000  # bytes, as in safetensors itself
AGAIN = "download or copy the file again"


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a JSON object; names file and position.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Expected a Hugging Face folder with config.json and {WEIGHTS} (or "
            f"shards with {INDEX}); copy the missing file into {path.parent}"
        )
    return plain.read_json(path)


class TensorFiles:
    """Tensors of one or several safetensors files, read one at a time.

    Attributes:
      files: tensor name -> file that holds it.
    """

    def __init__(self, files: dict[str, Path], stored: dict[str, str] | None = None) -> None:
        self.files = files
        self._stored = stored or {}
        self._open: dict[Path, Any] = {}

    @classmethod
    def of_folder(cls, folder: Path, more: Iterable[Path] = ()) -> "TensorFiles":
        """Finds the weights of a folder: its one file, or the shards of its index.

        Where there are both, the one file is read, as `transformers` does. An index that names other files,
        left over from an earlier save, is not read, and a warning says so.

        Args:
          folder: Hugging Face folder.
          more: further safetensors files; their tensors take precedence.

        Returns:
          The tensors of all files by name, none of them read.

        Raises:
          FileNotFoundError: there are no weights, or a shard of the index is missing.
          ValueError: the index is malformed, or a file is not readable.
        """
        tensors = cls({})
        if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
            tensors.files |= _read_index(folder / INDEX)
        else:
            tensors.add(_single_file(folder))
            _warn_of_other_weights(folder)
        for path in more:
            tensors.add(path)
        return tensors

    def under(self, names: dict[str, str]) -> "TensorFiles":
        """Some of the tensors under other names.

        Args:
          names: {name: name in the files}.
        """
        return TensorFiles({name: self.files[stored] for name, stored in names.items()}, names)

    def add(self, path: Path) -> None:
        """Includes every tensor of `path`."""
        self.files |= dict.fromkeys(self._handle(path, "its tensors").keys(), path)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the header of its file."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor.

        Raises:
          ValueError: its values are no floats, or one of them is NaN or infinity; names file and tensor.
        """
        dtype = self._slice(name).get_dtype()
        if dtype not in FLOATS:
            raise ValueError(
                f"{self.files[name]}: tensor {name!r} has dtype {dtype}; only {', '.join(FLOATS)} are "
                "supported. Dequantise the checkpoint and save it again"
            )
        values = self._handle(self.files[name], f"tensor {name!r}").get_tensor(self._stored.get(name, name))
        check_tensor(f"{self.files[name]}: tensor {name!r}", values)
        return values

    def _slice(self, name: str) -> Any:
        path = self.files[name]
        try:
            return self._handle(path, f"tensor {name!r}").get_slice(self._stored.get(name, name))
        except SafetensorError as error:
            raise ValueError(
                f"{path}: tensor {name!r} is missing, though {INDEX} says that it is in this file; {AGAIN}"
            ) from error

    def _handle(self, path: Path, wanted: str) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(str(path), framework="numpy")
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{path}: no such file, but {wanted} should be in it; {AGAIN}"
                ) from error
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path}: damaged safetensors file, cannot read {_first_lost(path) or wanted} "
                    f"({error}); {AGAIN}"
                ) from error
        return self._open[path]


def _single_file(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    pickled = found and not any(name.endswith(".safetensors") for name in found)
    fix = (
        "Pickled weights are never read: convert them with transformers, "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        if pickled
        else "Copy the weights there"
    )
    raise FileNotFoundError(f"{path}: no such file, and no {INDEX} either (found: {found or 'none'}). {fix}")


def _warn_of_other_weights(folder: Path) -> None:
    """Warns where an index beside the one file of weights names other files."""
    if not (folder / INDEX).is_file():
        return
    others = sorted({*_weight_map(folder / INDEX).values()} - {WEIGHTS})
    if others:
        warnings.warn(
            f"{named(folder / WEIGHTS)} is read, as transformers does; {INDEX} beside it names "
            f"{', '.join(others[:4])} and is ignored: remove the weights that are out of date",
            stacklevel=5,
        )


def _weight_map(path: Path) -> dict[str, str]:
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise ValueError(f"{path}: weight_map must map tensor names to files; {AGAIN}")
    return names


def _read_index(path: Path) -> dict[str, Path]:
    names = _weight_map(path)
    files = {name: path.parent / file for name, file in names.items()}
    for name, file in files.items():
        if file.parent != path.parent:
            raise ValueError(f"{path}: tensor {name!r} is in {names[name]!r}, outside the folder; {AGAIN}")
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file, but {path.name} says that it holds tensor {name!r}; "
                "copy the missing shard into the folder"
            )
    return files


def _first_lost(path: Path) -> str | None:
    """The first tensor that a truncated file cuts off, in words, if its header is intact."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LONGEST_HEADER:  # damaged itself
                return None
            header = parse_json(file.read(length))
        left = path.stat().st_size - 8 - length
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        lost = min((name for name in ends if ends[name] > left), key=lambda name: ends[name])
        return f"tensor {lost!r}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return None

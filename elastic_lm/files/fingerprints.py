"""Digests of files, checkpoints and weights in memory, which say whether they are still the same."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elastic_lm.files.gguf import is_gguf
from elastic_lm.files.hub import OR_NAME, local_model
from elastic_lm.processes import is_spread, on_host

SAMPLES = 16  # pieces that are read of a large file
SAMPLE = 1 << 16  # bytes of each
SAMPLED_NUMBERS = 1 << 14  # of each parameter in memory, at least: whole rows are read
PARTS = ("*.safetensors", "params/**/*", "*config.json", "tokenizer*.json", "vocab*", "merges.txt", "*.model")


def file_sha256(path: str | Path) -> str:
    """The SHA-256 digest of a file's bytes, in hexadecimal.

    Raises:
      OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: str | Path) -> tuple[str, bool]:
    """A digest of a file: of all of a small one, of 16 samples of a large one.

    Args:
      path: of the file.

    Returns:
      (16 hexadecimal digits, whether all of it was read).

    Raises:
      OSError: the file cannot be read.
    """
    size = Path(path).stat().st_size
    digest = hashlib.sha256()
    for piece in _pieces(Path(path), size):
        digest.update(piece)
    return digest.hexdigest()[:16], size <= SAMPLES * SAMPLE


def checkpoint_fingerprint(folder: str | Path) -> str:
    """A digest of the files that a model is loaded from, wherever and whenever they were saved.

    Small files, such as configuration and tokenizer, are read whole. Of a large file the name, the size and
    16 samples count, among them its beginning and its end, so that a digest takes no time. Saving the same
    weights again may give a different fingerprint.

    Args:
      folder: a Hugging Face folder, a checkpoint of this package, a .gguf file, or a model's name on the Hub.

    Returns:
      16 hexadecimal digits.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    folder = local_model(folder)
    if is_gguf(folder):
        return file_digest(folder)[0]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. {OR_NAME}")
    digest = hashlib.sha256()
    for path in sorted({path for part in PARTS for path in folder.glob(part) if path.is_file()}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        for piece in _pieces(path, size):
            digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    """All of a small file; samples of a large one."""
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE:
            yield file.read()
            return
        for i in range(SAMPLES):
            file.seek(i * (size - SAMPLE) // (SAMPLES - 1))
            yield file.read(SAMPLE)


def weights_fingerprint(params: Mapping[str, Any]) -> str:
    """A digest of sampled numbers of all parameters of a model, wherever they were loaded from.

    Small parameters are read whole, and of large ones rows at even distances. They are rounded to bfloat16,
    so that it does not matter whether a model is loaded in that or in float32: a Hugging Face folder and the
    checkpoint that was converted from it have one fingerprint. What was loaded in float16 was rounded before,
    and may have another.

    Args:
      params: canonical parameters or stacked ones, which give the same.

    Returns:
      16 hexadecimal digits. Where the parameters are spread over several processes, all must call this.
    """
    import jax.numpy as jnp

    digest = hashlib.sha256()
    for name, shape, rows in sorted(_sampled_parameters(params), key=lambda entry: entry[0]):
        digest.update(f"{name}\0{shape}\0".encode())
        digest.update(np.ascontiguousarray(rows.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]


def _sampled_parameters(params: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """(name, shape, some of its numbers) of every parameter, under its canonical name."""
    import jax

    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        first, *keys = (entry.key for entry in path)
        if first != "layers":
            yield "/".join((first, *keys)), leaf.shape, _sampled_rows(leaf)
            continue
        for i in range(leaf.shape[0]):
            yield "/".join((f"layers_{i}", *keys)), leaf.shape[1:], _sampled_rows(leaf, (i,))


def _sampled_rows(leaf: Any, at: tuple[int, ...] = ()) -> np.ndarray:
    """Rows at even distances of `leaf[at]`, on the host; all of it where it has one dimension.

    Arrays of a CPU are read in place. Of an accelerator's only the rows are copied.
    """
    shape = leaf.shape[len(at) :]
    if not is_spread(leaf) and not isinstance(leaf, np.ndarray):
        leaf = np.asarray(leaf) if all(device.platform == "cpu" for device in leaf.devices()) else leaf
    if len(shape) < 2:
        return on_host(leaf[at])

    total = math.prod(shape[:-1])
    count = min(total, -(-SAMPLED_NUMBERS // max(shape[-1], 1)))
    rows = np.linspace(0, total - 1, count).astype(np.int64)
    return on_host(leaf[(*at, *np.unravel_index(rows, shape[:-1]))])


def differing_parts(recorded: object, found: Mapping[str, str]) -> str:
    """What of a model is not what it was, in words.

    Args:
      recorded: fingerprints by part, such as "weights", of the model that something was fitted on; anything
        else, and "" as a fingerprint, count as not recorded.
      found: of the model that it is to be used with.

    Returns:
      "weights", "tokenizer", "weights and tokenizer", or "" where nothing is known to differ.
    """
    if not isinstance(recorded, Mapping):
        return ""
    pairs = ((part, recorded.get(part), value) for part, value in found.items())
    return " and ".join(part for part, old, new in pairs if old and new and old != new)

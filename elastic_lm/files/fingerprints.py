"""Digests of files and checkpoints, which say whether they are still the same."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

SAMPLES = 16  # pieces that are read of a large file
SAMPLE = 1 << 16  # bytes of each
PARTS = ("*.safetensors", "params/**/*", "*config.json", "tokenizer*.json", "vocab*", "merges.txt", "*.model")


def file_sha256(path: str | Path) -> str:
    """The SHA-256 digest of a file's bytes, in hexadecimal.

    Raises:
      OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_fingerprint(folder: str | Path) -> str:
    """A digest of the files that a model is loaded from, wherever and whenever they were saved.

    Small files, such as configuration and tokenizer, are read whole. Of a large file the name, the size and
    16 samples count, among them its beginning and its end, so that a digest takes no time. Saving the same
    weights again may give a different fingerprint.

    Args:
      folder: a Hugging Face folder, or a checkpoint of this package.

    Returns:
      16 hexadecimal digits.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder. Models are not downloaded: fetch one first, for example with "
            "`hf download NAME --local-dir DIR`"
        )
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

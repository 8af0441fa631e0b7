"""Folders that a quickstart writes anew every time, and only those."""

import shutil
from pathlib import Path


def check_replaceable(folder: Path, marks: tuple[str, ...], source: Path | None) -> None:
    """Refuses a folder that a quickstart did not write, or that holds the model it starts from.

    Args:
      folder: what is to be replaced; it need not exist.
      marks: files or folders of which an earlier quickstart left at least one in it.
      source: folder of the model that is read; None = there is none.

    Raises:
      ValueError: it may not be replaced; names it.
    """
    if source is not None and source.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{folder} is replaced by this run, but the model is read from it: choose another --out"
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not any((folder / mark).exists() for mark in marks):
        raise ValueError(
            f"{folder} was not written by an earlier quickstart (it has no {' or '.join(marks)}) and is not "
            "replaced: move it away, or choose another --out"
        )


def remove(folder: Path, marks: tuple[str, ...], source: Path | None) -> None:
    """Removes what an earlier quickstart left; the same arguments and errors as `check_replaceable`."""
    check_replaceable(folder, marks, source)
    if folder.exists():
        shutil.rmtree(folder)

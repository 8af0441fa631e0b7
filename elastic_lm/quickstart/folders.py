"""Folders that a quickstart writes anew every time, and only those."""

import shutil
from pathlib import Path

MARK = ".quickstart"  # lies in every folder that a quickstart made, and in no other


def check_replaceable(folder: Path, source: Path | None) -> None:
    """Refuses a folder that a quickstart did not write, or that holds the model it starts from.

    Args:
      folder: what is to be replaced; it need not exist.
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
    if not (folder / MARK).exists():
        raise ValueError(
            f"{folder} was not written by an earlier quickstart (it has no {MARK}) and is not replaced: move "
            "it away, or choose another --out"
        )


def renew(folder: Path, source: Path | None) -> None:
    """Makes an empty folder of our own; the same arguments and errors as `check_replaceable`."""
    check_replaceable(folder, source)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()

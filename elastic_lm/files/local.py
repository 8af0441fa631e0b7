"""Paths that must be on this machine: what names another one, like gs://bucket/run, is refused."""

import os
from pathlib import Path
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.files.remote import is_remote, refuse_here


def local_path(path: Any) -> Path:
    """`path` as a local one.

    Args:
      path: text or a path.

    Raises:
      ValueError: it names another machine, like gs://bucket/run, is empty, or is no path.
    """
    require(isinstance(path, str | os.PathLike), "path", path, "must be a path")
    # `Path("")` is the current folder, which a variable of the shell that is not set does not mean.
    require(str(path) != "", "path", path, "is empty; name a file or folder, such as . for the current one")
    if is_remote(path):
        raise refuse_here(path)
    return Path(path)


def require_folder_above(path: Path) -> None:
    """Refuses a path that cannot be made, because something above it is no folder.

    Args:
      path: a file or folder; it need not exist.

    Raises:
      NotADirectoryError: names what is in the way.
    """
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise NotADirectoryError(f"{path}: {above} is a file and no folder; choose another path")

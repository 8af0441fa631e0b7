"""Paths must be on this machine: what names another one, like gs://bucket/run, is refused before any work."""

import re
from pathlib import Path
from typing import Any

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` makes one slash of two


def local_path(path: Any) -> Path:
    """`path` as a local one.

    Args:
      path: text or a path.

    Raises:
      ValueError: it names another machine, like gs://bucket/run.
    """
    if REMOTE.match(str(path)):
        raise ValueError(f"{path}: remote paths are not supported yet; name a local file or folder")
    return Path(path)

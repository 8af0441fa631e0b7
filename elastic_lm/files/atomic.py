"""Files that appear complete or not at all, and JSON objects that are read from files."""

import json
import os
from pathlib import Path
from typing import Any

from elastic_lm.files.local import local_path


def read_json(path: Any) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Args:
      path: a `pathlib` or `epath` path.

    Returns:
      The object.

    Raises:
      ValueError: it does not hold one; names file and position.
    """
    again = "download or copy the file again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {again}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(value).__name__}; {again}")
    return value


def partial_path(path: str | Path) -> Path | None:
    """The path that a file is written to before it is moved to its own.

    Args:
      path: the file; its folder exists.

    Returns:
      A path beside it; None for links, pipes and devices, and in folders that take no new files.
    """
    path = Path(path)
    # Moving a file onto a link would replace the link, and onto a pipe the pipe.
    replaceable = not path.is_symlink() and (path.is_file() or not path.exists())
    takes_files = os.access(path.parent, os.W_OK)
    return path.with_name(path.name + ".partial") if replaceable and takes_files else None


def write_text_whole(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file that appears complete or not at all.

    A crash leaves the old file as it was, and a half-written one under another name.

    Args:
      path: the file; its folder is made where it is missing. Links, pipes and devices are written through.
      text: what it will hold.

    Raises:
      OSError: it cannot be written.
      ValueError: the path names another machine.
    """
    write_bytes_whole(path, text.encode())


def write_bytes_whole(path: str | Path, content: bytes) -> None:
    """`write_text_whole` for bytes."""
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    partial = partial_path(path)
    (partial or path).write_bytes(content)
    if partial:
        partial.replace(path)


def prepare_output(path: str | None) -> None:
    """Makes the folder of a file that long work will write at its end, and checks that it can be written.

    Args:
      path: the file; None, or - for stdout, = there is none.

    Raises:
      OSError: it cannot be written there.
      ValueError: the path names another machine.
    """
    if path in (None, "-"):
        return

    target = local_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)

    is_new = not target.exists()
    if is_new or target.is_file() or target.is_dir():  # opening and closing a pipe would cost it its reader
        target.open("a").close()
    if is_new:
        target.unlink()

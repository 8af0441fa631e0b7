"""The folders that orbax writes: names that it can read, what it leaves half-written, and its errors."""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from elastic_lm.files.remote import PATTERN_CHARACTERS, check_name, is_remote, place_of
from elastic_lm.files.unfinished import remove_anything, unfinished

ORBAX_PARTIAL = "orbax-checkpoint-tmp"  # in the names of folders that orbax has not finished
SETTLING = 3.0  # seconds, at most, for threads that still write after an error
SETTLED = 15  # looks in a row, 20 ms apart, at which they have written nothing more


@contextlib.contextmanager
def tidy(folder: Path, beginning: str) -> Iterator[None]:
    """Removes what orbax leaves half-written where it fails.

    It raises the first error of its threads. Those of tensorstore go on, make folders anew that have been
    removed, and cannot tell a loop that is closed about it.

    Args:
      folder: where it writes; in a store nothing is removed: without orbax' commit file it does not count.
      beginning: of the names of what is half-written.
    """
    try:
        yield
    except Exception:
        if is_remote(folder):
            raise
        shown = sys.unraisablehook
        sys.unraisablehook = lambda lost: None if "loop is closed" in str(lost.exc_value) else shown(lost)
        end, quiet = time.monotonic() + SETTLING, 0
        while quiet < SETTLED and time.monotonic() < end:
            found = [path for path in folder.iterdir() if path.name.startswith(beginning)]
            for path in found:
                remove_anything(path)
            quiet = 0 if found else quiet + 1
            time.sleep(0.02)
        raise


@contextlib.contextmanager
def readable_name(folder: str | Path) -> Iterator[epath.Path]:
    """A folder under a name that orbax can write to and read from.

    orbax takes brackets, * and ? for a pattern, and TensorStore a backslash for a slash: what they write
    under such a path may not be readable. They get a link without these characters, while the context lasts.

    Args:
      folder: exists, where its path has such characters.

    Raises:
      ValueError: its path has them and no link can stand in for it.
    """
    if is_remote(folder):
        check_name(folder)
        yield place_of(folder)
        return
    path = Path(folder).absolute()
    if not PATTERN_CHARACTERS.search(str(path)):
        yield epath.Path(path)
        return

    check_usable(path)
    with tempfile.TemporaryDirectory(prefix="elastic_lm_", ignore_cleanup_errors=True) as place:
        link = Path(place) / "link"
        with unfinished(Path(place)):
            link.symlink_to(path, target_is_directory=True)
            yield epath.Path(link)


def check_usable(path: Any) -> None:
    """Refuses a path that needs a link where there can be none, as with several processes or in a store."""
    alone = (
        jax.process_count() == 1
        and not is_remote(path)
        and not PATTERN_CHARACTERS.search(tempfile.gettempdir())
    )
    if not alone:
        check_name(path)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, which orbax lets run over hundreds."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]

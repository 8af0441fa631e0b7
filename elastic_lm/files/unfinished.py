"""What this process has begun to write and not finished: removed also where a signal ends the process."""

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

TRIES = 20  # to remove a folder that is still being filled

_paths: dict[Path, None] = {}  # in the order that they were begun
_moving = threading.Lock()


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Removes a file or folder when the block ends, unless it has another name by then."""
    _paths[path] = None
    try:
        yield
    finally:
        remove_anything(path)
        _paths.pop(path, None)


@contextlib.contextmanager
def finishing(path: Path) -> Iterator[None]:
    """Holds off a `discard_unfinished` of another thread while what is finished takes its name."""
    with _moving:
        yield
        _paths.pop(path, None)


def discard_unfinished() -> None:
    """Removes what this process has not finished. It finishes nothing more: it ends without unwinding."""
    _moving.acquire()
    for path in reversed(list(_paths)):
        remove_anything(path)


def remove_anything(path: Path) -> None:
    """Removes a file, a link or a folder, also one in which a thread of a library still makes files."""
    for _ in range(TRIES):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        time.sleep(0.02)

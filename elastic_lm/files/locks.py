"""Locks of the operating system: one process at a time. They end with their process, however it ends."""

import contextlib
import datetime
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from elastic_lm.files.local import require_folder_above
from elastic_lm.files.unfinished import unfinished

LOCK_FILE = ".lock"  # in a folder that one process works in


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder, until it is closed or its process ends.

    Args:
      descriptor: of the file; a second one of the same file counts as another process.

    Returns:
      Whether this process holds it now; None where the system or the file system knows no such locks.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def only_process(lock: str | Path, held: str | Path, fix: str) -> Iterator[None]:
    """Keeps other processes out while the block runs.

    A process that is killed leaves the file, which locks nothing then: the next one takes it over.

    Args:
      lock: the file that is locked; it says who holds it, and is removed in the end.
      held: what others are kept from, for messages.
      fix: what the second process can do, for messages.

    Raises:
      OSError: no file can be made there, or something above it is a file.
      ValueError: another process holds the lock; names it.
    """
    lock = Path(lock)
    require_folder_above(lock)
    made = _missing_parents(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(lock, held, fix)
        try:
            # Removed before it is closed: a process that opens it now sees that it is not at this path.
            with unfinished(lock):
                with contextlib.suppress(OSError):  # on a full disk the lock is held all the same
                    os.truncate(descriptor, 0)
                    os.write(descriptor, holder().encode())
                yield
        finally:
            os.close(descriptor)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _locked(lock: Path, held: str | Path, fix: str) -> int:
    """Descriptor of the locked file."""
    while True:
        try:
            # A link that somebody else has put there is not followed.
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(held)) from error

        locked = try_lock(descriptor)
        if locked is None:
            logging.warning("%s cannot be locked here: start no second process that writes to it", held)
            return descriptor
        if not locked:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"{held}: in use by {holder or 'another process'}; wait for its end, or {fix} ({lock})"
            )
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            return descriptor
        os.close(descriptor)  # its last holder has just removed it


def holder() -> str:
    """This process, in words: its number, its machine and the time."""
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {now}\n"


def _missing_parents(path: Path) -> list[Path]:
    """Folders that must be made before `path` can be, the deepest first."""
    return [folder for folder in path.absolute().parents if not folder.exists()]

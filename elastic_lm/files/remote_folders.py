"""Folders in object stores, written: what is there counts once its config is, which comes last.

Nothing can be renamed in an object store. So a folder first gets an object that says it is not finished; then
the config of what was there goes, and the rest of it; then everything new is written, the config last; and
then the first object goes. A process that is killed leaves nothing that anybody takes for a model, whichever
program reads it, and the next one that writes the folder begins anew.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from elastic_lm.files.hub import CONFIG, NATIVE
from elastic_lm.files.locks import holder
from elastic_lm.files.remote import address_of, listing, remove_below, remove_object, upload, write_object
from elastic_lm.files.remote_models import MARK, UNFINISHED
from elastic_lm.files.remote_workdirs import check_held

COMMITS = (CONFIG, NATIVE)  # written last
WRITERS = 8  # objects that are written at a time


def begin_folder(address: str) -> None:
    """Marks a folder as not finished, and removes what was there.

    Args:
      address: of the folder; the caller knows that what is there may go.

    Raises:
      OSError: see `files.remote.explained`.
    """
    check_held(address)
    write_object(f"{address}/{UNFINISHED}", (MARK + holder()).encode())
    remove_below(address, COMMITS, keep=(UNFINISHED,))


def finish_folder(folder: Path, address: str) -> None:
    """Writes the files of a folder to where `begin_folder` made room, the config last.

    Args:
      folder: on this machine.
      address: of the folder in the store.

    Raises:
      OSError: see `files.remote.explained`; the folder in the store stays marked as not finished.
    """
    check_held(address)
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(WRITERS) as pool:
        rest = (name for name in files if name not in COMMITS)
        for _ in pool.map(lambda name: upload(folder / name, f"{address}/{name}"), rest):
            pass
    for name in COMMITS:
        if name in files:
            upload(folder / name, f"{address}/{name}")
    remove_object(f"{address}/{UNFINISHED}")


@contextlib.contextmanager
def staging_folder(path: str | Path) -> Iterator[Path]:
    """A folder on this machine for what is to be written to a store.

    Args:
      path: its address; the folder has the same name.
    """
    with tempfile.TemporaryDirectory(prefix="elastic_lm_", ignore_cleanup_errors=True) as place:
        folder = Path(place) / address_of(path).rpartition("/")[2]
        folder.mkdir()
        yield folder


@contextlib.contextmanager
def whole_remote_folder(path: str | Path) -> Iterator[Path]:
    """Makes a folder in a store that counts when the block has ended well, or not at all.

    Args:
      path: its address.

    Yields:
      The folder on this machine to fill.

    Raises:
      OSError: see `files.remote.explained`.
    """
    address = address_of(path)
    with staging_folder(address) as folder:
        yield folder
        begin_folder(address)
        finish_folder(folder, address)


def top_names(address: str) -> set[str]:
    """Names of the objects and folders directly in a folder; none where there is no such folder.

    Raises:
      NotADirectoryError: there is an object of that name.
      OSError: see `files.remote.explained`.
    """
    found = listing(address)
    if "" in found:
        raise NotADirectoryError(f"{address}: is a file and no folder; choose another path")
    return {name.partition("/")[0] for name in found}

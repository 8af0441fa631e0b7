"""Model folders in object stores, read: copies of what describes a model, and of weights that must be files.

A folder is a model once its config is there, which is written last. Arrays of this package's own checkpoints
at gs:// are not copied: orbax reads them where they lie, each process those that its devices hold.
"""

import fnmatch
import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from elastic_lm.files.hub import DESCRIBING, EXITS, INDEX, NATIVE, WEIGHTS, shard_names
from elastic_lm.files.remote import (
    Entry,
    address_of,
    cache_folder,
    copied,
    download,
    is_direct,
    listing,
    origin_of,
    place_of,
    read_object,
    remember,
)

UNFINISHED = ".elastic_lm_unfinished"  # in a folder that is being written, or whose writer was stopped
MARK = "elastic_lm writes this folder and has not finished\n"  # how that object begins
PARTS = (*DESCRIBING, "*.safetensors", "params/*")  # of which a change makes another copy


def remote_model(name: Any, weights: bool = True) -> Path:
    """The copy on this machine of a model in an object store.

    Args:
      name: address of a folder, or of a file, such as one of GGUF.
      weights: copy these too, where they cannot be read from the store itself.

    Returns:
      The copy; `files.remote.named` knows where it comes from.

    Raises:
      FileNotFoundError: there is nothing at the address.
      OSError: see `files.remote.explained`.
      ValueError: what is there is not finished.
    """
    address = address_of(name)
    found = listing(address)
    if "" in found:
        return copied(address, found[""])
    if not found:
        raise FileNotFoundError(f"{address}: no such folder or file; check the bucket and the name")
    check_finished(address, found)

    folder = _copy_folder(address, found)
    names = [file for file in found if any(fnmatch.fnmatchcase(file, part) for part in DESCRIBING)]
    _copy(address, found, folder, names)
    if weights:
        _copy(address, found, folder, _weights(address, found, folder))
    return remember(folder, address)


def check_finished(address: str, found: dict[str, Entry]) -> None:
    """Refuses a folder that is being written, or whose writer was stopped in between.

    Args:
      address: of the folder.
      found: its objects.

    Raises:
      ValueError: it is not finished; says since when.
    """
    arrays = any(name.startswith("params/") for name in found)
    if UNFINISHED not in found and (not arrays or NATIVE in found):
        return
    since = ""
    if UNFINISHED in found:
        since = read_object(f"{address}/{UNFINISHED}").decode(errors="replace").removeprefix(MARK)
        since = f" ({since.strip()[:200]})"
    raise ValueError(
        f"{address}: is not finished: a process writes it now, or was stopped before its end{since}; wait, "
        "or run what writes it again"
    )


def is_unfinished(address: str, names: Collection[str]) -> bool:
    """Whether this package began to write a folder and did not finish it, so that it may begin anew.

    Args:
      address: of the folder.
      names: of the objects in it.

    Raises:
      OSError: see `files.remote.explained`.
    """
    return UNFINISHED in names and read_object(f"{address}/{UNFINISHED}").startswith(MARK.encode())


def stored_folder(folder: Path) -> Any:
    """Where the arrays of a checkpoint lie: the folder itself, or that in the store of which it is a copy."""
    address = origin_of(folder)
    return place_of(address) if address and is_direct(address) else folder


def stored_arrays(folder: Path) -> dict[str, Entry]:
    """The objects with the arrays of a model of which `folder` is a copy without them; {} = it is none."""
    address = origin_of(folder)
    if not address or not is_direct(address) or not (folder / NATIVE).is_file():
        return {}
    return {name: entry for name, entry in listing(address).items() if name.startswith("params/")}


def _copy_folder(address: str, found: dict[str, Entry]) -> Path:
    """The folder for copies of this version of a model."""
    digest = hashlib.sha256()
    for name, entry in sorted(found.items()):
        if any(fnmatch.fnmatchcase(name, part) for part in PARTS):
            digest.update(f"{name}\0{entry.size}\0{entry.version}\0".encode())
    scheme, _, rest = address.partition("://")
    above, _, name = rest.rpartition("/")
    return cache_folder() / scheme / above / f"{name}@{digest.hexdigest()[:16]}" / name


def _weights(address: str, found: dict[str, Entry], folder: Path) -> list[str]:
    """The objects with the weights, as far as they must be copied."""
    if NATIVE in found:
        return [] if is_direct(address) else [name for name in found if name.startswith("params/")]
    shards = shard_names(folder / INDEX) if INDEX in found else {WEIGHTS}
    return [name for name in (*sorted(shards), EXITS) if name in found]


def _copy(address: str, found: dict[str, Entry], folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = folder / name
        if not target.is_file() or target.stat().st_size != found[name].size:
            download(f"{address}/{name}", target)

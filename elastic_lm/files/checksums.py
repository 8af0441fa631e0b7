"""Checksums of the files of a folder, kept in it, so that one flipped bit of any of them is noticed on load.

They are CRC-32, which notices every change of up to 32 neighbouring bits and all but one in 2^32 of the
others. `zlib` comes with Python and computes it at several GB/s, about twice as fast as SHA-256 where the
processor helps with that, and ten times elsewhere. It guards against disks, memory and broken copies, not
against people. A folder without such a file, like one that was downloaded, is not checked. Folders may lie in
an object store, whose files are read through for it; several processes share them out.
"""

import fnmatch
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from elastic_lm.files.atomic import write_text_whole
from elastic_lm.files.remote import address_of, is_remote, listing, place_of

FILE = "checksums.json"
FORMAT = "elastic_lm checksums 1"
CHUNK = 1 << 20  # bytes that are read at once
READERS = 4  # files that are read at a time

Entry = dict[str, Any]  # of one file: "bytes" and "crc32"


def write_checksums(folder: Any, names: Iterable[str] | None = None) -> None:
    """Writes the checksums of files in a folder into it, as they read back from the disk.

    Args:
      folder: is complete; files that are added later are not checked.
      names: of the files, relative to the folder; None = all that are in it or below.

    Raises:
      OSError: a file cannot be read, or the checksums not be written.
    """
    folder = place_of(folder)
    names = _names(folder) if names is None else list(names)
    _write(folder, dict(zip(names, _entries(folder, names), strict=True)))


def join_checksums(folder: Path, elsewhere: Any, below: str) -> None:
    """Writes the checksums of a folder of which some files are in another place.

    Args:
      folder: holds all other files, and gets the checksums of all.
      elsewhere: the folder with the files that are not here, local or remote.
      below: what their names begin with, as seen from the folder.
    """
    names, others = _names(folder), _names(elsewhere)
    entries = dict(zip(names, _entries(folder, names), strict=True))
    entries |= zip((f"{below}/{name}" for name in others), _entries(elsewhere, others), strict=True)
    _write(folder, entries)


def update_checksums(folder: Any, names: Iterable[str]) -> None:
    """Takes note of files that were written anew, in a folder that has checksums.

    Args:
      folder: nothing is done where it has no checksums.
      names: of the files, relative to the folder.

    Raises:
      ValueError: the checksums are damaged.
    """
    folder = place_of(folder)
    if (folder / FILE).is_file():
        _write(folder, _read(folder / FILE) | {name: file_entry(folder / name) for name in names})


def forget_checksums(folder: Any, names: Iterable[str]) -> None:
    """Leaves files unchecked that are about to be written anew, so that a crash in between damages nothing.

    Args:
      folder: nothing is done where it has no checksums.
      names: of the files, relative to the folder.

    Raises:
      ValueError: the checksums are damaged.
    """
    folder, gone = place_of(folder), set(names)
    if not (folder / FILE).is_file():
        return
    entries = _read(folder / FILE)
    if gone & entries.keys():
        _write(folder, {name: entry for name, entry in entries.items() if name not in gone})


def replaced_entries(file: Path, contents: Mapping[str, bytes]) -> bytes:
    """The contents of a file of checksums where files that it names are to have other contents.

    Args:
      file: of the checksums.
      contents: of files, by name; those that it does not name are left out.

    Raises:
      ValueError: the checksums are damaged.
    """
    entries = _read(file)
    for name in entries.keys() & contents.keys():
        entries[name] = {"bytes": len(contents[name]), "crc32": f"{zlib.crc32(contents[name]):08x}"}
    return _text(entries).encode()


def check_files(folder: Any, patterns: Iterable[str] = ("*",), divided: bool = False) -> None:
    """Checks files of a folder against the checksums in it; without checksums everything passes.

    Args:
      folder: of a model, or of one step of a training run.
      patterns: the files that count, relative to the folder; * stands for any characters, / among them.
      divided: all processes call this and read a part of the files each, so that what one of them raises is
        for the caller to tell the others.

    Raises:
      ValueError: a file is missing or not as it was written; names it.
    """
    folder = place_of(folder)
    if not (folder / FILE).is_file():
        return

    patterns = tuple(patterns)
    remote = listing(address_of(folder)) if is_remote(folder) else {}
    fix = f"copy the folder again, or remove {folder / FILE} if the change was meant"
    dues = {
        name: due
        for name, due in _read(folder / FILE).items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    for name, due in dues.items():
        path = folder / name
        there = name in remote if is_remote(folder) else path.is_file()
        if not there:
            raise ValueError(f"{path}: is missing, though {FILE} names it; {fix}")
        size = remote[name].size if is_remote(folder) else path.stat().st_size
        if size != due["bytes"]:
            raise ValueError(f"{path}: has {size} bytes and was written with {due['bytes']}; {fix}")
    if divided:
        dues = _own_share(dues)
    for (name, due), found in zip(dues.items(), _entries(folder, dues), strict=True):
        path = folder / name
        if found != due:
            raise ValueError(
                f"{path}: is damaged or was changed: its CRC-32 is {found['crc32']} and was {due['crc32']} "
                f"when it was written; {fix}"
            )


def _names(folder: Any) -> list[str]:
    """The files in a folder and below it, but for the checksums."""
    if is_remote(folder):
        names = list(listing(address_of(folder)))
    else:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if name != FILE]


def _own_share(dues: dict[str, Entry]) -> dict[str, Entry]:
    """The files that this one of several processes reads through."""
    import jax

    names = sorted(dues, key=lambda name: (-dues[name]["bytes"], name))
    return {name: dues[name] for name in names[jax.process_index() :: jax.process_count()]}


def _entries(folder: Any, names: Iterable[str]) -> Iterator[Entry]:
    """What `file_entry` says of files, several of which are read at a time: `zlib` lets threads work."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(file_entry, [folder / name for name in names])


def file_entry(path: Any) -> Entry:
    """The size and the checksum of a file, all of which is read.

    Args:
      path: a `pathlib` or `epath` path.

    Raises:
      OSError: it cannot be read.
    """
    buffer = memoryview(bytearray(CHUNK))
    size = crc = 0
    with path.open("rb") if is_remote(path) else path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, crc = size + count, zlib.crc32(buffer[:count], crc)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def _write(folder: Any, files: dict[str, Entry]) -> None:
    write_text_whole(folder / FILE, _text(files))


def _text(files: dict[str, Entry]) -> str:
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(files[name])}" for name in sorted(files))
    own = f"{zlib.crc32(lines.encode()):08x}"
    return f'{{"format": "{FORMAT}", "crc32": "{own}", "files": {{\n{lines}\n}}}}\n'


def _read(path: Any) -> dict[str, Entry]:
    """The entries of a file of checksums, which is spelled in one way only, so that it checks itself."""
    try:
        text = path.read_bytes().decode()
        files = json.loads(text)["files"]
        whole = _text(files) == text and all(
            isinstance(entry["bytes"], int) and isinstance(entry["crc32"], str) for entry in files.values()
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        whole, files = False, {}
    if not whole:
        raise ValueError(
            f"{path}: is damaged or was changed; copy the folder again, or remove this file to load what is "
            "there unchecked"
        )
    return files

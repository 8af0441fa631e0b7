"""Addresses of object stores, such as gs://bucket/folder: which are supported, and what is done to objects.

An object is written whole or not at all, has no folder but a name, and cannot be renamed, locked or appended
to. `fsspec` speaks to the stores; the package of each is an extra. Arrays take another way: orbax and
TensorStore read and write them at gs:// themselves.
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import importlib.util
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from elastic_lm.config.checks import require
from elastic_lm.files.shortage import lacks_memory

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)  # `Path` makes one slash of two
# Scheme -> the package that fsspec needs for it, and the extra that installs it; "" = none.
STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"), "memory": ("", "")}
DIRECT = ("gs",)  # where orbax and TensorStore read and write arrays themselves
LOG_IN = {
    "gs": "log in with `gcloud auth application-default login`, or check the rights of this account",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or check the rights of this account",
}
PROBE = ".probe"  # how objects end that `check_writable` writes for a moment
REMOVERS = 8  # objects that are removed at a time
PATTERN_CHARACTERS = re.compile(r"[\[\]*?\\]")  # of a path, that orbax or fsspec take for something else
_comparing = threading.Lock()  # of stores in memory


@dataclasses.dataclass(frozen=True)
class Entry:
    """One object of a store.

    Attributes:
      size: in bytes.
      version: changes whenever the object is written again.
      changed: seconds since 1970; 0 = not known.
    """

    size: int
    version: str
    changed: float = 0.0


def is_remote(path: Any) -> bool:
    """Whether a path names another machine, supported or not."""
    return ADDRESS.match(str(path)) is not None


def address_of(path: Any) -> str:
    """A remote path as it is written, also where `pathlib` took one of its slashes.

    Args:
      path: for which `is_remote` holds.

    Returns:
      The address, like gs://bucket/run, without a slash at its end.

    Raises:
      ValueError: addresses of this kind are not supported, the package for them is not installed, or there is
        no bucket in it; says what to do.
    """
    scheme, rest = _parts(path)
    package, extra = STORES[scheme]
    if package and not _is_installed(package):
        fix = f'pip install "elastic-lm[{extra}]"'
        raise ValueError(f"{path}: remote paths at {scheme}:// need {package}: {fix}")
    if not rest:
        raise ValueError(f"{path}: names no bucket; write {scheme}://BUCKET/FOLDER")
    return f"{scheme}://{rest}"


def _parts(path: Any) -> tuple[str, str]:
    """The scheme of a remote path, and what follows it."""
    found = ADDRESS.match(str(path))
    assert found is not None
    scheme = found[1].lower()
    if scheme not in STORES:
        raise ValueError(
            f"{path}: remote paths of this kind are not supported; name a local file or folder, or one at "
            "gs:// or s3://"
        )
    return scheme, found[2].strip("/")


def refuse_here(path: Any) -> ValueError:
    """Why a remote path does not do where only one of this machine does."""
    _parts(path)
    return ValueError(f"{path}: remote paths are not supported here; name a local file or folder")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_direct(address: str) -> bool:
    """Whether arrays are read and written at an address without a copy on this machine's disk."""
    return address.partition("://")[0] in DIRECT


def check_direct(path: Any) -> None:
    """Refuses a remote path where arrays are written that only this machine and gs:// take.

    Raises:
      ValueError: it is one; says what to do.
    """
    if is_remote(path) and not is_direct(address_of(path)):
        fix = "choose one of these as the workdir; models and other files go to other stores as well"
        raise ValueError(f"{path}: training writes checkpoints to this machine and to gs:// only; {fix}")


def place_of(path: Any) -> Any:
    """A path of any kind as an object with the methods of one.

    Args:
      path: local, or at gs://.

    Returns:
      A `pathlib.Path`, or an `epath.Path` for a remote one.

    Raises:
      ValueError: see `address_of`.
    """
    if not is_remote(path):
        return Path(path)
    from etils import epath

    return epath.Path(address_of(path))


def filesystem(address: str) -> Any:
    """The file system of fsspec that an address belongs to."""
    import fsspec

    # Without its cache of listings: TensorStore and other processes write behind its back.
    return fsspec.filesystem(address.partition("://")[0], use_listings_cache=False)


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Gives what goes wrong with a store one line that names the address and says what to do.

    Raises:
      FileNotFoundError: there is nothing at the address, or no such bucket.
      PermissionError: this user may not have it.
      OSError: the store cannot be reached, or fails.
    """
    try:
        yield
    except Exception as error:
        said = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {said[0] if said else ''}"[:200]
        # What is about this machine, or was said before.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
        if full or lacks_memory(error) or str(error).startswith(address):
            raise
        if isinstance(error, FileNotFoundError):
            fix = "check the bucket and the name"
            raise FileNotFoundError(
                f"{address}: there is nothing of that name, or no such bucket; {fix}"
            ) from error
        status = str(getattr(error, "code", ""))
        refused = isinstance(error, PermissionError) or status in ("401", "403")
        if refused or re.search("credential|forbidden", what, re.IGNORECASE):
            fix = LOG_IN.get(address.partition("://")[0], "check the rights of this account")
            raise PermissionError(f"{address}: access is refused ({what}); {fix}") from error
        fix = "check the address, the network and the account"
        raise ConnectionError(f"{address}: the store does not answer as it should ({what}); {fix}") from error


def listing(address: str) -> dict[str, Entry]:
    """The objects below an address, by their names relative to it; an object itself is named "".

    Raises:
      OSError: see `explained`; an address without objects gives none.
    """
    files = filesystem(address)
    with explained(address):
        try:
            found = files.find(address, detail=True)
        except FileNotFoundError:  # stores differ in what they say of an empty folder
            return {}
    root = files._strip_protocol(address).strip("/")
    return {
        name.strip("/").removeprefix(root).strip("/"): _entry(info)
        for name, info in found.items()
        if info.get("type") != "directory" and not name.endswith("/")
    }


def entry_of(address: str) -> Entry | None:
    """What a store says of one object; None = there is none."""
    files = filesystem(address)
    with explained(address):
        try:
            info = files.info(address)
        except FileNotFoundError:
            return None
    return None if info.get("type") == "directory" else _entry(info)


def _entry(info: dict[str, Any]) -> Entry:
    times = (info.get(key) for key in ("mtime", "LastModified", "created"))
    changed = next((time for time in times if time), None)
    if isinstance(changed, datetime.datetime):  # listings of the store in memory have a number
        changed = changed.timestamp()
    seconds = float(changed) if isinstance(changed, int | float) else 0.0
    known = [str(info[key]) for key in ("generation", "ETag", "etag", "md5Hash") if info.get(key)]
    if not known and not seconds:
        told = "the store tells neither version nor time, so that copies of it could be out of date"
        raise ValueError(f"{info.get('name')}: {told}; copy it to this machine, and name the copy")
    return Entry(int(info.get("size") or 0), known[0] if known else f"{seconds}", seconds)


def exists(address: str) -> bool:
    """Whether there is an object of that name, or one below it."""
    files = filesystem(address)
    with explained(address):
        return bool(files.exists(address))


def read_object(address: str) -> bytes:
    """The contents of an object.

    Raises:
      OSError: see `explained`.
    """
    with explained(address):
        return filesystem(address).cat_file(address)


def write_object(address: str, content: bytes) -> None:
    """Writes an object, whole or not at all.

    Raises:
      OSError: see `explained`.
    """
    with explained(address):
        filesystem(address).pipe_file(address, content)


def replace_object(address: str, content: bytes, version: str) -> str | None:
    """Writes an object where nobody else has written it meanwhile. At gs:// the store compares, in one step.

    Args:
      address: of the object.
      content: of it.
      version: that it must have, see `Entry`; "" = there is none.

    Returns:
      The version that was written; None = nothing was, because there is another one.

    Raises:
      OSError: see `explained`.
    """
    if not is_direct(address):
        with _comparing:
            entry = entry_of(address)
            if (entry.version if entry else "") != version:
                return None
            write_object(address, content)
            entry = entry_of(address)
            return entry.version if entry else None
    files = filesystem(address)
    bucket, name, _ = files.split_path(address)
    place = f"{files._location}/upload/storage/v1/b/{quote(bucket, safe='')}/o"
    given = {"uploadType": "media", "name": name, "ifGenerationMatch": version or "0"}
    about = _compared(address, "POST", place, data=content, json_out=True, **given)
    return None if about is None else str(about["generation"])


def remove_version(address: str, version: str) -> None:
    """Removes an object, unless it has another version by now; see `replace_object`."""
    if not is_direct(address):
        with _comparing:
            entry = entry_of(address)
            if entry is not None and entry.version == version:
                remove_object(address)
        return
    bucket, name, _ = filesystem(address).split_path(address)
    with contextlib.suppress(FileNotFoundError):
        _compared(address, "DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=version)


def _compared(address: str, *request: Any, **given: Any) -> Any:
    """The answer of Google's store to a request with a precondition; None = it does not hold."""
    with explained(address):
        try:
            return filesystem(address).call(*request, **given)
        except Exception as error:
            if isinstance(error, FileExistsError) or str(getattr(error, "code", "")) == "412":
                return None
            raise


def upload(source: Path, address: str) -> None:
    """Writes an object from a file, whole or not at all."""
    with explained(address):
        filesystem(address).put_file(str(source), address)


def download(address: str, target: Path) -> None:
    """Writes a file from an object, whole or not at all."""
    partial = target.with_name(f".{target.name[:200]}.{os.getpid()}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with explained(address):
            filesystem(address).get_file(address, str(partial))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def remove_object(address: str) -> None:
    """Removes an object; nothing happens where there is none."""
    files = filesystem(address)
    with explained(address), contextlib.suppress(FileNotFoundError):
        files.rm_file(address)


def remove_below(address: str, first: Sequence[str] = (), keep: Sequence[str] = ()) -> None:
    """Removes all objects below an address; nothing happens where there are none.

    Args:
      address: of the folder.
      first: names of objects that go before all others, one by one: those by which the folder counts.
      keep: names of objects that stay.
    """
    found = listing(address)
    for name in first:
        if name in found:
            remove_object(f"{address}/{name}")
    rest = (f"{address}/{name}" if name else address for name in found if name not in (*first, *keep))
    with ThreadPoolExecutor(REMOVERS) as pool:
        for _ in pool.map(remove_object, rest):
            pass


def check_writable(address: str) -> None:
    """Writes an object beside `address` and removes it, so that long work is not done for nothing.

    Raises:
      OSError: see `explained`.
    """
    probe = f"{address}.{os.getpid()}{PROBE}"
    write_object(probe, b"")
    remove_object(probe)


def check_name(path: Any) -> None:
    """Refuses characters that a store takes and orbax or fsspec read as a pattern."""
    usable = not PATTERN_CHARACTERS.search(str(path))
    require(usable, "path", str(path), "holds one of []*?\\; choose a path without")


@functools.cache
def cache_folder() -> Path:
    """Where copies of remote files are kept; it may be removed when no command runs."""
    from elastic_lm.files.compilation_cache import OFF, VARIABLE, user_folder

    chosen = os.environ.get(VARIABLE, "")
    try:
        usable = chosen and chosen.lower() not in OFF and not is_remote(chosen)
        folder = (Path(chosen) if usable else user_folder()) / "remote"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    import tempfile

    return Path(tempfile.mkdtemp(prefix="elastic_lm_remote_"))


_addresses: dict[Path, str] = {}  # copies of files and folders on this machine, and where they come from


def remember(copy: Path, address: str) -> Path:
    """Keeps in mind where a copy comes from, for `named`; returns the copy."""
    _addresses[copy] = address
    return copy


def forget(copy: Path) -> None:
    """The end of what `remember` began."""
    _addresses.pop(copy, None)


def origin_of(path: Path) -> str | None:
    """The address that a local copy comes from; None = it is no copy."""
    for above in (path, *path.parents):
        if above in _addresses:
            below = path.relative_to(above).as_posix()
            return _addresses[above] + ("" if below == "." else f"/{below}")
    return None


def named(path: Path) -> str:
    """A path as the user knows it: the address of a copy, or the path itself."""
    return origin_of(path) or str(path)


def with_addresses(text: str) -> str:
    """A message as the user can understand it: with the addresses of copies in the place of their paths."""
    for copy in sorted([*_addresses], key=lambda copy: -len(str(copy))):
        text = text.replace(str(copy), _addresses[copy])
    return text


@contextlib.contextmanager
def addresses_in_errors() -> Iterator[None]:
    """Names addresses in errors about copies of what lies there."""
    try:
        yield
    except (ValueError, OSError) as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (with_addresses(error.args[0]), *error.args[1:])
        name = getattr(error, "filename", None)
        if isinstance(error, OSError) and isinstance(name, str):
            error.filename = with_addresses(name)
        raise


def fetched(path: Any) -> Path:
    """A file to read on this machine: the path itself, or a copy of an object, which is made where it is new.

    Copies are kept by the version of the object, in a folder of the user's caches.

    Args:
      path: of a file, local or remote.

    Raises:
      FileNotFoundError: the store has no such object.
      OSError: see `explained`.
      ValueError: see `address_of`.
    """
    if not is_remote(path):
        from elastic_lm.files.local import local_path

        return local_path(path)
    address = address_of(path)
    entry = entry_of(address)
    if entry is None:
        raise FileNotFoundError(f"{address}: there is no such file; check the bucket and the name")
    return copied(address, entry)


def copied(address: str, entry: Entry) -> Path:
    """The copy of one object, made unless it is there."""
    import hashlib

    scheme, _, rest = address.partition("://")
    folder, _, name = rest.rpartition("/")
    version = hashlib.sha256(f"{entry.version}\0{entry.size}".encode()).hexdigest()[:16]
    target = cache_folder() / scheme / folder / f"{name}@{version}" / name
    if not target.is_file() or target.stat().st_size != entry.size:
        download(address, target)
        if entry.changed:
            os.utime(target, (entry.changed, entry.changed))
    return remember(target, address)


def remote_files(path: Any, suffixes: Sequence[str]) -> list[Path]:
    """Copies of the files that a remote path of data stands for, sorted.

    Args:
      path: of an object, of a folder, or a pattern of names such as gs://bucket/data/*.jsonl.
      suffixes: how the names of files in folders end.

    Raises:
      FileNotFoundError: there are none.
      OSError: see `explained`.
      ValueError: see `address_of`.
    """
    address = address_of(path)
    found = listing(address) if not PATTERN_CHARACTERS.search(address) else {}
    if found:
        named = [name for name in found if not name or name.lower().endswith(tuple(suffixes))]
        if not named:
            reason = f"no file ending in {', '.join(suffixes)} in it"
            raise FileNotFoundError(f"data path {address}: {reason}")
        return [copied(f"{address}/{name}" if name else address, found[name]) for name in sorted(named)]

    files = filesystem(address)
    with explained(address):
        matching = files.glob(address, detail=True)
    entries = {name: _entry(info) for name, info in matching.items() if info.get("type") != "directory"}
    if not entries:
        raise FileNotFoundError(
            f"data path {address}: no file matches this pattern, or there is none of that name"
        )
    return [copied(address_of(files.unstrip_protocol(name)), entries[name]) for name in sorted(entries)]

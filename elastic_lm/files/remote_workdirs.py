"""A folder in an object store that one process works in: small files here and there, and a lease on it.

Files of a few kilobytes that are appended to or written again, such as metrics.jsonl, live in a folder on
this machine while the process runs, and go to the store whenever something that counts on them does, every
few seconds in between, and at the end. Checkpoints and models go to the store directly.

An object store has no locks. The process that works in a folder writes its name into lease.json there, again
and again. Another one that finds it waits until it would have been written again; only then it is taken over.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic_lm.files.locks import holder
from elastic_lm.files.remote import (
    address_of,
    check_name,
    check_writable,
    download,
    explained,
    filesystem,
    forget,
    is_remote,
    origin_of,
    place_of,
    read_object,
    remember,
    remove_object,
    upload,
    write_object,
)

LEASE = "lease.json"
BEAT = 15.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one after which a lease is free
PUSH = 10.0  # seconds after which files that changed go to the store
LOCAL_ONLY = ("wandb",)  # folders that stay here


class Mirror:
    """The small files of a remote folder, on this machine."""

    def __init__(self, folder: Path, address: str, writes: bool) -> None:
        """Copies what lies directly in the remote folder.

        Args:
          folder: on this machine; empty.
          address: of the remote folder.
          writes: this process sends its files there.
        """
        self.folder, self.address, self.writes = folder, address, writes
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self.pull()

    def pull(self) -> None:
        """Copies the files directly in the remote folder that are not here."""
        files = filesystem(self.address)
        with explained(self.address):
            try:
                found = files.ls(self.address, detail=True)
            except FileNotFoundError:
                found = []
        for info in found:
            name = info["name"].rstrip("/").rpartition("/")[2]
            target = self.folder / name
            if info.get("type") != "directory" and name != LEASE and name and not target.exists():
                download(f"{self.address}/{name}", target)
                self._sent[name] = _state(target)

    def push(self) -> None:
        """Writes the files that changed here to the store, those that changed first first.

        Raises:
          OSError: see `files.remote.explained`.
        """
        if not self.writes:
            return
        with self._lock:
            states = {path.relative_to(self.folder).as_posix(): _state(path) for path in self._files()}
            for name in sorted(states, key=lambda name: states[name]):
                if self._sent.get(name) != states[name]:
                    upload(self.folder / name, f"{self.address}/{name}")
                    self._sent[name] = states[name]

    def _files(self) -> Iterator[Path]:
        for path in self.folder.rglob("*"):
            parts = path.relative_to(self.folder).parts
            hidden = any(part.startswith(".") for part in parts) or parts[0] in LOCAL_ONLY
            if not hidden and path.is_file():
                yield path


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


_mirrors: list[Mirror] = []  # of this process


def flush(path: Any) -> None:
    """Sends the small files of a remote folder that something in it counts on, before that is written.

    Args:
      path: anything in such a folder, local or remote; nothing happens for other paths.
    """
    address = (address_of(path) if is_remote(path) else origin_of(Path(path))) or ""
    for mirror in _mirrors:
        if f"{address}/".startswith(f"{mirror.address}/"):
            mirror.push()


def refresh(path: Path) -> None:
    """Copies the small files of a remote folder that another process has sent, where they are not here.

    Args:
      path: the folder on this machine; nothing happens where it is no copy.
    """
    for mirror in _mirrors:
        if mirror.folder == path and not mirror.writes:
            mirror.pull()


def stored_at(path: Path) -> Any:
    """Where something large in a working folder is written: in the store, if the folder is remote."""
    address = origin_of(path)
    return path if address is None else place_of(address)


@contextlib.contextmanager
def working_folder(path: Any, writes: bool = True, fix: str = "choose another workdir") -> Iterator[Path]:
    """The folder on this machine to work in.

    Args:
      path: of the folder; a local one is given back as it is.
      writes: this process writes the files of a remote folder and holds its lease; False = another does.
      fix: what a second process can do, for messages.

    Yields:
      The folder; for a remote one, a folder with copies of the files directly in it.

    Raises:
      OSError: see `files.remote.explained`.
      ValueError: remote paths of this kind are not supported, or another process works in the folder.
    """
    if not is_remote(path):
        from elastic_lm.files.local import local_path

        yield local_path(path)
        return
    address = address_of(path)
    check_name(address)
    with contextlib.ExitStack() as stack:
        if writes:
            check_writable(f"{address}/{LEASE}")
            stack.enter_context(leased(address, fix))
        place = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="elastic_lm_", ignore_cleanup_errors=True)
        )
        folder = Path(place) / address.rpartition("/")[2]
        folder.mkdir()
        mirror = Mirror(folder, address, writes)
        remember(folder, address)
        _mirrors.append(mirror)
        ended = threading.Event()
        sender = threading.Thread(target=_keep_sending, args=(mirror, ended), daemon=True)
        sender.start()
        try:
            with _addresses_in_messages(folder, address):
                yield folder
        finally:
            ended.set()
            sender.join()
            _mirrors.remove(mirror)
            try:
                mirror.push()
            finally:
                forget(folder)


def _keep_sending(mirror: Mirror, ended: threading.Event) -> None:
    while not ended.wait(PUSH):
        try:
            mirror.push()
        except OSError as error:  # the next push that something counts on says so
            logging.warning("%s: files are not sent now and are tried again: %s", mirror.address, error)


@contextlib.contextmanager
def _addresses_in_messages(folder: Path, address: str) -> Iterator[None]:
    """Names the remote folder in errors about its copy."""
    try:
        yield
    except (ValueError, OSError) as error:
        if error.args and isinstance(error.args[0], str) and str(folder) in error.args[0]:
            error.args = (error.args[0].replace(str(folder), address), *error.args[1:])
        name = getattr(error, "filename", None)
        if isinstance(error, OSError) and isinstance(name, str):
            error.filename = name.replace(str(folder), address)
        raise


@contextlib.contextmanager
def leased(address: str, fix: str) -> Iterator[None]:
    """Holds the lease of a remote folder while the block runs.

    Args:
      address: of the folder.
      fix: what a second process can do, for messages.

    Raises:
      ValueError: another process holds it; names it.
    """
    place = f"{address}/{LEASE}"
    _await_end(address, place, fix)
    mine = {"holder": holder().strip(), "host": socket.gethostname(), "pid": os.getpid()}
    mine["id"] = secrets.token_hex(8)
    _write(place, mine, 0)
    # Two processes that found it free at the same time both wrote it: the later one has it.
    found = _read(place)
    if found.get("id") != mine["id"]:
        raise ValueError(_taken(address, found, fix))

    ended = threading.Event()
    beats = threading.Thread(target=_keep_alive, args=(place, mine, ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        with contextlib.suppress(OSError):
            if _read(place).get("id") == mine["id"]:
                remove_object(place)


def _await_end(address: str, place: str, fix: str) -> None:
    """Waits until a lease is free, which it is once it has not been written for long enough."""
    found = _read(place)
    if not found or _has_ended(found):
        return
    logging.warning("%s: waiting up to %d s for the end of %s", address, PATIENCE, found.get("holder"))
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(1.0)
        now = _read(place)
        if not now:
            return
        if now != found:
            raise ValueError(_taken(address, now, fix))


def _has_ended(lease: dict[str, Any]) -> bool:
    """Whether its process was one of this machine, and is gone."""
    if lease.get("host") != socket.gethostname() or not isinstance(lease.get("pid"), int):
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _taken(address: str, lease: dict[str, Any], fix: str) -> str:
    return f"{address}: in use by {lease.get('holder') or 'another process'}; wait for its end, or {fix}"


def _keep_alive(place: str, lease: dict[str, Any], ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT):
        beat += 1
        try:
            if _read(place).get("id", lease["id"]) != lease["id"]:
                logging.error("%s: another process has taken this folder over; stop one of the two", place)
                return
            _write(place, lease, beat)
        except OSError as error:
            logging.warning("%s is not renewed now and is tried again: %s", place, error)


def _write(place: str, lease: dict[str, Any], beat: int) -> None:
    write_object(place, (json.dumps({**lease, "beat": beat}) + "\n").encode())


def _read(place: str) -> dict[str, Any]:
    """What a lease says; {} = there is none."""
    try:
        found = json.loads(read_object(place))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

"""A folder in an object store that one process works in: small files here and there, and a lease on it.

Files of a few kilobytes that are appended to or written again, such as metrics.jsonl, live in a folder on
this machine while the process runs, and go to the store whenever something that counts on them does, every
few seconds in between, and at the end. Checkpoints and models go to the store directly.

An object store has no locks. The process that works in a folder writes its name into lease.json there, again
and again. Another one that finds it waits until it would have been written again; only then it is taken over.
Each write names the version that it replaces, so that of two processes one has the lease, and a process that
stood still and has lost it writes and removes nothing more.
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
    PROBE,
    address_of,
    addresses_in_errors,
    check_name,
    download,
    entry_of,
    explained,
    filesystem,
    forget,
    is_remote,
    origin_of,
    place_of,
    read_object,
    remember,
    remove_version,
    replace_object,
    upload,
)

LEASE = "lease.json"
BEAT = 15.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one after which a lease is free
PUSH = 10.0  # seconds after which files that changed go to the store
LOCAL_ONLY = ("wandb",)  # folders that stay here


class Mirror:
    """The small files of a remote folder, on this machine."""

    def __init__(self, folder: Path, address: str, lease: "Lease | None") -> None:
        """Copies what lies directly in the remote folder.

        Args:
          folder: on this machine; empty.
          address: of the remote folder.
          lease: of this process, which sends its files there; None = another one does.
        """
        self.folder, self.address, self.lease = folder, address, lease
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
            own = name == LEASE or name.endswith(PROBE)
            if info.get("type") != "directory" and name and not own and not target.exists():
                download(f"{self.address}/{name}", target)
                self._sent[name] = _state(target)

    def push(self) -> None:
        """Writes the files that changed here to the store, those that changed first first.

        Raises:
          LeaseLost: another process has taken the folder over.
          OSError: see `files.remote.explained`.
        """
        if self.lease is None:
            return
        with self._lock:
            self.lease.check()
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

    Raises:
      LeaseLost: another process has taken the folder over.
      OSError: see `files.remote.explained`.
    """
    for mirror in _mirrors_of(path):
        mirror.push()


def check_held(path: Any) -> None:
    """Makes sure that this process may still write in a remote folder and remove what is there.

    Args:
      path: anything in such a folder, local or remote; nothing happens for other paths.

    Raises:
      LeaseLost: another process has taken the folder over.
      OSError: see `files.remote.explained`.
    """
    for mirror in _mirrors_of(path):
        if mirror.lease is not None:
            mirror.lease.check()


def _mirrors_of(path: Any) -> list[Mirror]:
    address = (address_of(path) if is_remote(path) else origin_of(Path(path))) or ""
    return [mirror for mirror in _mirrors if f"{address}/".startswith(f"{mirror.address}/")]


def refresh(path: Path) -> None:
    """Copies the small files of a remote folder that another process has sent, where they are not here.

    Args:
      path: the folder on this machine; nothing happens where it is no copy.
    """
    for mirror in _mirrors:
        if mirror.folder == path and mirror.lease is None:
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
      ValueError: remote paths of this kind are not supported, or another process works in the folder;
        `LeaseLost` where one has taken it over meanwhile.
    """
    if not is_remote(path):
        from elastic_lm.files.local import local_path

        yield local_path(path)
        return
    address = address_of(path)
    check_name(address)
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(leased(address, fix)) if writes else None
        place = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="elastic_lm_", ignore_cleanup_errors=True)
        )
        folder = Path(place) / address.rpartition("/")[2]
        folder.mkdir()
        mirror = Mirror(folder, address, lease)
        remember(folder, address)
        _mirrors.append(mirror)
        ended = threading.Event()
        sender = threading.Thread(target=_keep_sending, args=(mirror, ended), daemon=True)
        sender.start()
        try:
            with addresses_in_errors():
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
        except LeaseLost:
            return
        except OSError as error:  # the next push that something counts on says so
            logging.warning("%s: files are not sent now and are tried again: %s", mirror.address, error)


class LeaseLost(ValueError):
    """Another process has taken over the folder that this one works in."""


class Lease:
    """The right of this process to write below a remote folder."""

    def __init__(self, address: str, entries: dict[str, Any], version: str) -> None:
        """Begins with the lease as it was just written.

        Args:
          address: of the folder.
          entries: what lease.json says of this process.
          version: of lease.json.
        """
        self._address, self._entries, self._version = address, entries, version
        self._beat, self._renewed = 0, _now()
        self._taken = ""  # why it is lost
        self._lock = threading.Lock()

    def renew(self) -> None:
        """Gives a sign of life.

        Raises:
          LeaseLost: another process has the lease.
          OSError: see `files.remote.explained`.
        """
        with self._lock:
            self._renew()

    def check(self) -> None:
        """Makes sure that no other process has the lease; a lease that was renewed lately is not asked for.

        Raises:
          LeaseLost: another process has it.
          OSError: see `files.remote.explained`.
        """
        with self._lock:
            since = [abs(now - then) for now, then in zip(_now(), self._renewed, strict=True)]
            if self._taken or max(since) > BEAT:
                self._renew()

    def _renew(self) -> None:
        if not self._taken:
            began = _now()
            version = _write(f"{self._address}/{LEASE}", self._entries, self._beat + 1, self._version)
            if version is not None:
                self._version, self._renewed = version, began
                self._beat += 1
                return
            other = _read(f"{self._address}/{LEASE}")[0].get("holder") or "another process"
            self._taken = (
                f"{self._address}: was taken over by {other}, and this process writes nothing more there; "
                "choose another workdir, or run again when the other one has ended"
            )
        raise LeaseLost(self._taken)

    def release(self) -> None:
        """Removes it, unless another process has it."""
        if not self._taken:
            remove_version(f"{self._address}/{LEASE}", self._version)


def _now() -> tuple[float, float]:
    """Two clocks: one stands still while a machine sleeps, and the other one is set."""
    return time.monotonic(), time.time()


@contextlib.contextmanager
def leased(address: str, fix: str) -> Iterator[Lease]:
    """Holds the lease of a remote folder while the block runs.

    Args:
      address: of the folder.
      fix: what a second process can do, for messages.

    Yields:
      The lease.

    Raises:
      OSError: see `files.remote.explained`.
      ValueError: another process holds it; names it.
    """
    place = f"{address}/{LEASE}"
    free = _await_end(address, place, fix)
    mine = {"holder": holder().strip(), **_here(), "pid": os.getpid(), "id": secrets.token_hex(8)}
    version = _write(place, mine, 0, free)
    if version is None:
        raise ValueError(_taken(address, _read(place)[0], fix))

    lease, ended = Lease(address, mine, version), threading.Event()
    beats = threading.Thread(target=_keep_alive, args=(lease, place, ended), daemon=True)
    beats.start()
    try:
        yield lease
    finally:
        ended.set()
        beats.join()
        with contextlib.suppress(OSError):
            lease.release()


def _await_end(address: str, place: str, fix: str) -> str:
    """Waits until a lease is free, which it is once it has not been written for long enough.

    Returns:
      The version that may be replaced; "" = there is none.
    """
    found, version = _read(place)
    if not found or _has_ended(found):
        return version
    logging.warning("%s: waiting up to %d s for the end of %s", address, PATIENCE, found.get("holder"))
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(1.0)
        now, version = _read(place)
        if not now:
            return version
        if now != found:
            raise ValueError(_taken(address, now, fix))
    return version


def _here() -> dict[str, Any]:
    """What tells apart machines, their starts, and containers that have numbers of processes of their own."""
    boot, processes = "", 0
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.stat("/proc/self/ns/pid").st_ino
    return {"host": socket.gethostname(), "boot": boot, "pid_namespace": processes}


def _has_ended(lease: dict[str, Any]) -> bool:
    """Whether its process was one that would be seen from here, and is gone."""
    here = _here()
    seen = all(here.values()) and all(lease.get(key) == value for key, value in here.items())
    if not seen or not isinstance(lease.get("pid"), int):
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


def _keep_alive(lease: Lease, place: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        try:
            lease.renew()
        except LeaseLost as error:  # whoever writes next raises it
            logging.error("%s", error)
            return
        except OSError as error:
            logging.warning("%s is not renewed now and is tried again: %s", place, error)


def _write(place: str, lease: dict[str, Any], beat: int, version: str) -> str | None:
    """Writes a lease where it has a version; returns the new one, or None where it has another."""
    entries = {**lease, "beat": beat}
    written = replace_object(place, (json.dumps(entries) + "\n").encode(), version)
    if written is None:
        # A request that was repeated, because its answer did not come, finds what it wrote itself.
        found, now = _read(place)
        return now if found == entries else None
    return written


def _read(place: str) -> tuple[dict[str, Any], str]:
    """What a lease says, {} = nothing, and its version, "" = there is none."""
    entry = entry_of(place)
    if entry is None:
        return {}, ""
    try:
        found = json.loads(read_object(place))
    except (FileNotFoundError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}, entry.version

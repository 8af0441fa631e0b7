"""Files and folders that appear complete or not at all, and JSON objects that are read from files."""

import contextlib
import errno
import io
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from elastic_lm.config.parse import parse_json
from elastic_lm.files.local import local_path, require_folder_above
from elastic_lm.files.locks import try_lock
from elastic_lm.files.remote import address_of, check_writable, is_remote, remove_below, write_object
from elastic_lm.files.unfinished import finishing, remove_anything, unfinished

PARTIAL, OLD = "partial", "old"
# Beside the name of a file or folder: ours, and those of earlier versions, which had the process in them.
LEFTOVER = r"\.{}\.(partial|old)(?:-x[0-9a-f]{{16}}|-[0-9]+)?"
# What libraries say in their own errors, in the words of the system.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
COMMITS = ("commit_success.txt",)  # by which a checkpoint of orbax counts in a store
LONGEST = 200  # bytes of a name that tags are put behind


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
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {again}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(value).__name__}; {again}")
    return value


@contextlib.contextmanager
def naming(path: str | Path, partial: Path | None = None) -> Iterator[None]:
    """Gives the errors of writing the file's name, whatever library raises them.

    The system names the file where one cannot be opened, and says only "No space left on device" where one
    cannot be written; safetensors, tokenizers and orbax have errors of their own for both.

    Args:
      path: what is written, as the user knows it.
      partial: what it is called meanwhile; messages about it and what is in it name `path` instead.

    Raises:
      OSError: what the block raised about the disk, with the system's number and the path.
    """
    try:
        yield
    except OSError as error:
        named, inside = str(path), str(error.filename or partial)
        if partial is not None and inside.startswith(str(partial)):
            named += inside.removeprefix(str(partial))
        elif error.filename is not None and str(error.filename) != str(real_place(path)):
            raise
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), named) from error
    except Exception as error:
        number = next((n for n in DISK_ERRORS if os.strerror(n) in str(error)), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def new_beside(path: Path, tag: str = PARTIAL) -> Path:
    """A path beside `path` that nobody can guess, and that `remove_leftovers` knows again.

    Args:
      path: a file or folder.
      tag: PARTIAL for what is not finished or not needed any more, OLD for what may have to go back.
    """
    return path.with_name(f".{short_name(path)}.{tag}-x{secrets.token_hex(8)}")


def real_place(path: str | Path) -> Path:
    """Where a file or folder lies, behind links: moving something onto a link would replace the link."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def whole_file(path: str | Path, links: bool = True) -> Iterator[BinaryIO]:
    """Opens a file that appears complete, when the block ends well, or not at all.

    A crash leaves the old file as it was, and a half-written one under another name, which the next process
    that writes the file removes.

    Args:
      path: the file, local or an object of a store; its folder is made where it is missing. Pipes and devices
        are written to directly, and so are files in folders that take no new ones.
      links: a file that is a link is written where it leads; False = it is replaced itself.

    Raises:
      OSError: it cannot be written; names it.
      ValueError: remote paths of this kind are not supported.
    """
    if is_remote(path):
        address, buffer = address_of(path), io.BytesIO()
        yield buffer
        write_object(address, buffer.getvalue())
        return
    named = local_path(path)
    path = real_place(named) if links else named.absolute()
    partial = new_beside(path)
    with naming(named, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not can_be_replaced(path) and (links or not path.is_symlink()):
            with path.open("wb") as file:
                yield file
            return

        remove_leftovers(path)
        # Neither a file nor a link that lies there already is opened.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with unfinished(partial):
            with open(os.open(partial, flags, 0o666), "wb") as file:
                try_lock(file.fileno())
                yield file
                file.flush()
                if path.exists():
                    with contextlib.suppress(OSError):  # of another user
                        shutil.copymode(path, partial)
                os.fsync(file.fileno())
            with finishing(partial):
                partial.replace(path)


@contextlib.contextmanager
def whole_folder(path: str | Path, partial: Path | None = None) -> Iterator[Path]:
    """Makes a folder that appears complete, when the block ends well, or not at all.

    Args:
      path: its place; an empty folder or an earlier one there is replaced. Where it is a link to a folder,
        that folder is. Where it is remote, a folder on this machine is filled and then sent.
      partial: what is filled meanwhile, beside `real_place(path)`; None = a new name.

    Yields:
      The folder to fill.

    Raises:
      OSError: the disk takes no more; names `path`.
    """
    if is_remote(path):
        from elastic_lm.files.remote_folders import whole_remote_folder

        with whole_remote_folder(path) as folder:
            yield folder
        return
    target = real_place(path)
    partial = partial or new_beside(target)
    with naming(path, partial):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        with unfinished(partial):
            partial.mkdir()
            with _claimed(partial):
                yield partial
                with finishing(partial):
                    replace_folder(partial, target)


def replace_folder(partial: Path, target: Path) -> None:
    """Moves a finished folder to its place, over an empty folder or an earlier one.

    A process that is killed between the two moves leaves the earlier one under another name, from which
    `remove_leftovers` puts it back.

    Args:
      partial: the finished folder, on the same file system.
      target: its place, which is no link; what lies there is removed.
    """
    if not target.exists() or not any(target.iterdir()):
        partial.rename(target)
        return

    old = new_beside(target, OLD)
    with _claimed(target):
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            old.rename(target)
            raise
        remove_folder(old, target)


def remove_folder(folder: Path, name: Path | None = None) -> None:
    """Removes a folder that disappears at once, and not file by file.

    Args:
      folder: what goes.
      name: what it is called meanwhile; None = after itself.
    """
    if is_remote(folder):
        remove_below(address_of(folder), COMMITS)
        return
    going = new_beside(name or folder)
    folder.rename(going)
    with unfinished(going):
        pass


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes left beside a file or folder, and puts back what they had taken away.

    What another process is writing at the moment stays.

    Args:
      path: what they were writing, which is no link.
    """
    for tag, leftover in _leftovers(path):
        if tag == OLD and not path.exists():
            with _claimed(leftover) as ours:
                if ours:
                    leftover.rename(path)
                    logging.warning("%s is back, which a process had moved away that was killed", path)
            continue
        with _claimed(leftover) as ours:
            if ours:
                remove_anything(leftover)


def moved_away(path: str | Path) -> str:
    """For the message that there is no such folder: where a killed process left it; "" = it did not."""
    target = real_place(path)
    found = [] if target.exists() else [at for tag, at in _leftovers(target) if tag == OLD]
    if not found:
        return ""
    return f"; a process that was killed left an earlier one in {found[0]}: rename it to {target}"


def write_text_whole(path: str | Path, text: str, links: bool = True) -> None:
    """Writes a UTF-8 file that appears complete or not at all; see `whole_file`."""
    write_bytes_whole(path, text.encode(), links)


def write_bytes_whole(path: str | Path, content: bytes, links: bool = True) -> None:
    """`write_text_whole` for bytes."""
    with whole_file(path, links) as file:
        file.write(content)


def append_whole(file: FileIO, data: bytes) -> None:
    """Appends all of the data to a file, or nothing.

    Args:
      file: opened to append to, without a buffer.
      data: what is added.

    Raises:
      OSError: it does not fit on the disk; the file ends where it ended before.
    """
    rest, end = memoryview(data), os.fstat(file.fileno()).st_size
    try:
        while rest:
            rest = rest[file.write(rest) or 0 :]
    except OSError:
        with contextlib.suppress(OSError):  # of pipes
            file.truncate(end)
        raise


def can_be_replaced(path: str | Path) -> bool:
    """Whether a new file can take a name: not that of a pipe or device, nor in a folder that takes none."""
    path = Path(path)
    return (path.is_file() or not path.exists()) and os.access(path.parent, os.W_OK)


def short_name(path: Path) -> str:
    """The name, or its beginning where a longer one could not be a file's."""
    return os.fsencode(path.name)[:LONGEST].decode(errors="ignore")


def _leftovers(path: Path) -> list[tuple[str, Path]]:
    """(tag, path) of what may be left beside `path`, the latest first."""
    pattern = re.compile(LEFTOVER.format(re.escape(short_name(path))))
    try:
        found = [(match[1], path.parent / name) for name in os.listdir(path.parent)
                 if (match := pattern.fullmatch(name))]  # fmt: skip
        return sorted(found, key=lambda pair: pair[1].lstat().st_ctime, reverse=True)
    except OSError:  # no folder, or one that another process is cleaning as well
        return []


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Locks a file or folder for the block; False where another process is at it, or it is gone."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags)
    except OSError:  # a link has nothing to lock, and neither has a folder on Windows
        yield path.is_symlink() or (os.name == "nt" and path.exists())
        return
    try:
        yield try_lock(descriptor) is True
    finally:
        os.close(descriptor)


def prepare_output(path: str | None) -> None:
    """Makes the folder of a file that long work will write at its end, and checks that it can be written.

    Args:
      path: the file; None, or - for stdout, = there is none.

    Raises:
      OSError: it cannot be written there.
      ValueError: remote paths of this kind are not supported.
    """
    if path is None or path == "-":
        return
    if is_remote(path):
        check_writable(address_of(path))
        return

    with naming(str(path)):
        named = local_path(path)
        require_folder_above(named)
        target = real_place(named)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() or target.is_dir():  # opening and closing a pipe would cost it its reader
            target.open("a").close()
        elif not target.exists():
            probe = new_beside(target)
            with naming(str(path), probe), unfinished(probe):
                os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))

"""Files and folders that are written whole, what killed processes leave, and disks that take no more."""

import errno
import logging
import os
import pathlib
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elastic_lm.files import atomic, unfinished
from elastic_lm.files.atomic import (
    append_whole,
    moved_away,
    naming,
    prepare_output,
    remove_folder,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_text_whole,
)


class Killed(BaseException):
    """What no code of ours catches."""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stop_renaming(patch: pytest.MonkeyPatch, after: int) -> None:
    """Makes the process die, as it were, at rename number `after` + 1."""
    rename, calls = Path.rename, iter(range(100))

    def dying(self: Path, target: Path) -> Path:
        if next(calls) == after:
            raise Killed
        return rename(self, target)

    patch.setattr(Path, "rename", dying)


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "file.json"
    write_text_whole(file, "old\n")
    assert names(file.parent) == {"file.json"}

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_text_whole(file, "new\n")
    assert file.read_text() == "old\n"
    write_text_whole(str(file), "größer\n")
    assert file.read_text(encoding="utf-8") == "größer\n"
    assert names(file.parent) == {"file.json"}


def test_links_and_pipes_are_written_through(tmp_path: Path) -> None:
    link, file, pipe = tmp_path / "link", tmp_path / "file", tmp_path / "pipe"
    link.symlink_to(file)
    for text in ("text", "another"):
        write_text_whole(link, text)
        assert link.is_symlink()
        assert file.read_text() == text
    write_text_whole(link, "own", links=False)
    assert not link.is_symlink()
    assert file.read_text() == "another"

    os.mkfifo(pipe)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text_whole(pipe, "text")
    reader.join(10)
    assert found == ["text"]
    assert pipe.is_fifo()


def test_nobody_can_put_a_link_where_something_will_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, file = tmp_path / "victim", tmp_path / "file"
    victim.write_text("precious")
    # Even where the name is guessed.
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "0" * 16)
    planted = atomic.new_beside(file)
    planted.symlink_to(victim)
    monkeypatch.setattr(atomic, "remove_leftovers", lambda _: None)
    with pytest.raises(FileExistsError):
        write_text_whole(file, "new")
    assert victim.read_text() == "precious"


def test_modes_are_those_of_a_new_file_or_of_the_old_one(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "written"
    plain.touch()
    write_text_whole(written, "text")
    assert written.stat().st_mode == plain.stat().st_mode
    written.chmod(0o600)
    write_text_whole(written, "secret")
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


def test_names_as_long_as_names_can_be(tmp_path: Path) -> None:
    file = tmp_path / ("ü" * 127)  # 254 bytes
    write_text_whole(file, "text")
    assert file.read_text() == "text"
    assert names(tmp_path) == {file.name}


@pytest.mark.parametrize("before", [None, {}, {"a": "old", "b": "old"}])
def test_folders_are_whole_or_not_there(tmp_path: Path, before: dict[str, str] | None) -> None:
    target = tmp_path / "model"
    if before is not None:
        target.mkdir()
        for name, text in before.items():
            (target / name).write_text(text)

    def broken_off() -> None:
        with whole_folder(target) as partial:
            (partial / "a").write_text("new")
            raise Killed

    with pytest.raises(Killed):
        broken_off()
    assert target.exists() == (before is not None)
    assert {p.name: p.read_text() for p in target.glob("*")} == (before or {})

    with whole_folder(target) as partial:
        (partial / "a").write_text("new")
    assert {p.name: p.read_text() for p in target.iterdir()} == {"a": "new"}
    assert names(tmp_path) == {"model"}


def test_a_folder_behind_a_link_is_replaced_there(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "model", tmp_path / "link"
    real.mkdir(parents=True)
    (real / "a").write_text("old")
    link.symlink_to(real)
    with whole_folder(link) as partial:
        (partial / "b").write_text("new")
    assert link.is_symlink()
    assert names(real) == {"b"}
    assert names(tmp_path) == {"disk", "link"}
    assert names(real.parent) == {"model"}


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_at_any_move_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, renames: int
) -> None:
    target = tmp_path / "model"
    with whole_folder(target) as partial:
        (partial / "a").write_text("old")
    # Killed for good: nothing is tidied up, and nothing is put back.
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "remove_anything", lambda _: None)
        stop_renaming(patch, renames)
        if renames == 1:
            patch.setattr(atomic, "replace_folder", lambda *_: _half(*_))
        with pytest.raises(Killed), whole_folder(target) as partial:
            (partial / "a").write_text("new")
    assert len(names(tmp_path)) == 2
    assert ("rename it to" in moved_away(target)) == (renames == 1)

    with caplog.at_level(logging.WARNING):
        remove_leftovers(target)
    assert names(tmp_path) == {"model"}
    assert (target / "a").read_text() == ("new" if renames == 2 else "old")
    assert ("model is back" in caplog.text) == (renames == 1)
    assert moved_away(target) == ""


def _half(partial: Path, target: Path) -> None:
    """The first of the two moves of `replace_folder`."""
    target.rename(atomic.new_beside(target, atomic.OLD))
    raise Killed


def test_what_earlier_versions_left_is_removed(tmp_path: Path) -> None:
    for name in (".model.partial", ".model.partial-32627", ".model.old-99", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    (tmp_path / ".model.old-7").symlink_to(tmp_path / "model")
    others = {"model.partial", ".model2.partial-1", ".model.partial-notes", ".model.older", ".amodel.old-1"}
    for name in others:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path / "model")
    assert names(tmp_path) == {"model", *others}
    assert (tmp_path / "model" / "config.json").exists()


def test_what_another_process_writes_stays(tmp_path: Path) -> None:
    script = """
import pathlib, sys
from elastic_lm.files.atomic import whole_file, whole_folder
with whole_folder(sys.argv[1] + "/model") as partial, whole_file(sys.argv[1] + "/file") as file:
    (partial / "a").write_text("new")
    file.write(b"new")
    print("writing", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"writing\n"
        before = names(tmp_path)
        for name in ("model", "file"):
            remove_leftovers(tmp_path / name)
        assert names(tmp_path) == before
        assert len(before) == 2
        other.kill()
    for name in ("model", "file"):
        remove_leftovers(tmp_path / name)
    assert not names(tmp_path)


def test_folders_go_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").touch()
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "remove_anything", lambda _: None)
        remove_folder(folder)
    assert not folder.exists()
    remove_leftovers(folder)
    assert not names(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Failed writing: \"x\": No space left on device [os_error_code='28']"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_errors_of_the_disk_have_the_name_of_the_file(tmp_path: Path, error: Exception) -> None:
    for writing in (naming, whole_file, whole_folder):
        with pytest.raises(OSError, match="No space left") as caught, writing(tmp_path / "out"):
            raise error
        assert (caught.value.filename, caught.value.errno) == (str(tmp_path / "out"), errno.ENOSPC)
    assert not names(tmp_path)


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such thing"), naming("x"):
        raise ValueError("no such thing")
    with pytest.raises(FileNotFoundError) as caught, naming("x"):
        (tmp_path / "missing").read_text()
    assert caught.value.filename == str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as caught, whole_folder(tmp_path / "model") as partial:
        (partial / "missing" / "file").write_text("text")
    assert caught.value.filename == str(tmp_path / "model" / "missing" / "file")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_device_is_named() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        write_text_whole("/dev/full", "text")
    assert caught.value.filename == "/dev/full"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits")
def test_what_does_not_fit_leaves_no_half_line(tmp_path: Path) -> None:
    script = """
import io, resource, sys
from elastic_lm.files.atomic import append_whole, write_text_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
with io.FileIO(sys.argv[1] + "/lines", "ab") as file:
    append_whole(file, b"x" * 700)
    whole = sys.argv[1] + "/whole"
    for write in (lambda: append_whole(file, b"y" * 700), lambda: write_text_whole(whole, "z" * 2000)):
        try:
            write()
        except OSError as error:
            print(error.filename, error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["None File too large", f"{tmp_path}/whole File too large"]
    assert (tmp_path / "lines").read_text() == "x" * 700
    assert names(tmp_path) == {"lines"}


def test_outputs_are_tried_without_a_trace(tmp_path: Path) -> None:
    there, new = tmp_path / "there", tmp_path / "folder" / "new"
    there.write_text("old")
    for path in (there, new, None, "-"):
        prepare_output(None if path is None else str(path))
    assert there.read_text() == "old"
    assert not names(new.parent)
    with pytest.raises(OSError, match=str(there)):
        prepare_output(str(there / "below"))


def test_appending_is_appending(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    for line in (b"a\n", b"b\n"):
        with open(file, "ab", buffering=0) as opened:
            append_whole(opened, line)
    assert file.read_bytes() == b"a\nb\n"


def test_what_is_finished_is_not_discarded_while_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "_moving", threading.Lock())
    discarding = threading.Thread(target=unfinished.discard_unfinished, daemon=True)
    rename = Path.rename

    def slow(self: Path, target: Path) -> Path:
        discarding.start()
        discarding.join(0.1)  # it waits
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", slow)
    with whole_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("new")
    discarding.join(10)
    assert (tmp_path / "model" / "a").read_text() == "new"
    assert names(tmp_path) == {"model"}

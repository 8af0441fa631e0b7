"""One process at a time: who holds a lock is said, and a killed process holds none."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_lm.files.locks import LOCK_FILE, only_process

HOLD = """
import sys
from elastic_lm.files.locks import LOCK_FILE, only_process
with only_process(sys.argv[1] + "/" + LOCK_FILE, sys.argv[1], "choose another"):
    print("held", flush=True)
    sys.stdin.read()
"""


def lock(folder: Path) -> object:
    return only_process(folder / LOCK_FILE, folder, "choose another workdir")


def test_the_holder_is_named_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="in use by process") as caught, lock(folder):
            pass
        holder.kill()
    message = str(caught.value)
    assert message.startswith(f"{folder}: in use by process {holder.pid} on {socket.gethostname()} since 20")
    assert "wait for its end, or choose another workdir" in message
    assert "\n" not in message
    assert (folder / LOCK_FILE).exists()
    with lock(folder):
        assert f"process {os.getpid()} on" in (folder / LOCK_FILE).read_text()
    assert not (folder / LOCK_FILE).exists()


def test_what_was_made_for_the_lock_alone_goes_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with pytest.raises(ValueError, match="refused"), lock(folder):
        raise ValueError("refused")
    assert not (tmp_path / "a").exists()
    with lock(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_within_a_process_too(tmp_path: Path) -> None:
    with lock(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), lock(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    with lock(tmp_path):
        pass


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links") as caught, lock(tmp_path):
        pass
    assert caught.value.filename == str(tmp_path)
    assert (tmp_path / "victim").read_text() == "precious"


def test_the_folder_is_named_where_no_lock_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match="file is a file and no folder"), lock(folder):
            pass

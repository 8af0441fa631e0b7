"""Files that are written whole, and those that cannot be replaced."""

import os
import threading
from pathlib import Path

import pytest

from elastic_lm.files.atomic import partial_path, write_text_whole


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "file.json"
    write_text_whole(file, "old\n")
    assert [path.name for path in file.parent.iterdir()] == ["file.json"]

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_text_whole(file, "new\n")
    assert file.read_text() == "old\n"
    write_text_whole(str(file), "größer\n")
    assert file.read_text(encoding="utf-8") == "größer\n"
    assert partial_path(file) == file.parent / "file.json.partial"
    assert not file.with_name("file.json.partial").exists()


def test_links_and_pipes_are_written_through(tmp_path: Path) -> None:
    link, file, pipe = tmp_path / "link", tmp_path / "file", tmp_path / "pipe"
    link.symlink_to(file)
    write_text_whole(link, "text")
    assert link.is_symlink()
    assert file.read_text() == "text"
    os.mkfifo(pipe)
    assert (partial_path(link), partial_path(pipe)) == (None, None)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text_whole(pipe, "text")
    reader.join(10)
    assert found == ["text"]
    assert pipe.is_fifo()

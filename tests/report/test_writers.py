"""Writers: what lands on disk and in the terminal."""

import json
import pathlib
import sys

import pytest

from elastic_lm.report.writers import JsonlWriter, ProgressWriter, TensorBoardWriter, Writers


def test_lines_of_repeated_steps_are_replaced(tmp_path) -> None:
    file = tmp_path / "run" / "metrics.jsonl"
    first = JsonlWriter(file)
    for step in (1, 2, 3):
        first.write(step, {"loss": step / 3})
    first.close()
    with file.open("a") as cut:
        cut.write('{"step": 2, "lo')  # a killed process
    again = JsonlWriter(file, resume_step=2)
    again.write(3, {"loss": 9.0})
    again.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.333333}, {"step": 2, "loss": 0.666667}, {"step": 3, "loss": 9.0}]


def test_the_time_of_an_earlier_start_is_replaced(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    for start, share in ((0, 0.5), (3, 0.75)):
        writer = JsonlWriter(file, resume_step=start)
        writer.write(3, {"loss": 1.0})
        writer.write(3, {"goodput": share, "wall_seconds": 2.0})
        writer.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line.get("goodput") for line in lines] == [None, None, 0.75]


def test_what_the_terminal_shows_of_rates_and_times(capsys) -> None:
    writer = ProgressWriter(total=4)
    writer.write(1, {"tokens_per_s": 100.0, "tokens_per_s_per_chip": 100.0, "mfu": 0.5})
    writer.write(2, {"tokens_per_s": 100.0, "tokens_per_s_per_chip": 25.0})
    writer.write(2, {"goodput": 0.5, "wall_seconds": 2.0})  # the run says it in words
    first, second = capsys.readouterr().out.splitlines()
    assert "tokens_per_s 100  mfu 0.5" in first
    assert "tokens_per_s 100  tokens_per_s_per_chip 25" in second


def test_lines_survive_a_kill_while_they_are_rewritten(tmp_path, monkeypatch) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n')

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonlWriter(file, resume_step=1)
    assert file.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_progress_without_a_terminal_is_plain_lines(capsys) -> None:
    writer = ProgressWriter(total=10, start=4)
    writer.write(5, {"loss": 1.5})
    writer.close()
    line = capsys.readouterr().out
    assert "step 5/10" in line
    assert "loss 1.5" in line
    assert "left" in line


def test_progress_in_a_terminal_is_a_bar(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    writer = ProgressWriter(total=10)
    writer.write(10, {"loss": 1.5})
    writer.close()
    assert "10/10" in capsys.readouterr().out


def test_writers_pass_on(tmp_path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    writer = Writers([JsonlWriter(file) for file in files])
    writer.write(1, {"loss": 2.0})
    writer.close()
    assert files[0].read_text() == files[1].read_text() == '{"step": 1, "loss": 2.0}\n'


def test_tensorboard_files(tmp_path) -> None:
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    writer = TensorBoardWriter(tmp_path)
    writer.write(1, {"loss": 2.0})
    writer.close()
    assert list(tmp_path.glob("events*"))

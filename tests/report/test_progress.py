"""A step says how far it is: rarely without a terminal, and never nothing while it is silent for long."""

import io
import time

import pytest
from rich.console import Console

from elastic_lm.report import progress as progress_module
from elastic_lm.report.progress import Progress


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_plain_lines_come_while_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "EVERY", 0.01)
    console = plain()
    with Progress(console) as progress:
        progress.update("timing", 1, 4)
        while not printed(console):
            time.sleep(0.01)
    assert "timing: 1 of 4, about" in printed(console)[0]
    lines = len(printed(console))
    time.sleep(0.05)
    assert len(printed(console)) == lines  # it ends with the step


def test_plain_lines_are_rare() -> None:
    console = plain()
    with Progress(console) as progress:
        assert list(progress.over(range(1000), 1000, "reading")) == list(range(1000))
    assert not printed(console)


def test_a_terminal_has_one_line_that_goes_away() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(console) as progress:
        for _ in progress.over(range(3), 3, "reading"):
            progress._bar.refresh()  # pyright: ignore[reportOptionalMemberAccess]
        progress.update("solving")
    assert "reading" in "".join(printed(console))
    with Progress(console, live=False) as silent:
        assert silent._bar is None


def test_the_line_says_what_is_known() -> None:
    progress = Progress(plain())
    assert progress.line() == "0 s so far"
    progress.update("solving")
    assert progress.line() == "solving: 0 s so far"
    progress.update("reading", 0, 4)
    assert progress.line() == "reading: 0 of 4, 0 s so far"
    progress._began -= 10
    progress.update("reading", 1, 4)
    assert progress.line() == "reading: 1 of 4, about 30 s left"

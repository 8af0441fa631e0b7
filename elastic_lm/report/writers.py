"""Where a run's numbers go: JSON lines on disk, a progress bar in the terminal, TensorBoard as an extra."""

import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import rich.progress

from elastic_lm.config.parse import parse_json
from elastic_lm.files.atomic import append_whole, naming, write_text_whole


class Writer(Protocol):
    """What receives the scalars of a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` at optimizer step `step`."""
        ...

    def close(self) -> None:
        """Writes out what is buffered."""
        ...


class JsonlWriter:
    """Appends {"step": ..., name: value, ...} lines to a file.

    Lines after `resume_step` are dropped when the file is opened, because the steps that they describe are
    about to be run again.

    Raises:
      ValueError: the file is damaged; names it.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = [line for line in _lines(path) if _step_of(line) <= resume_step]
        write_text_whole(path, "".join(kept))
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line, all of it or nothing."""
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        with naming(self._path):
            append_whole(self._file, (json.dumps({"step": step, **rounded}) + "\n").encode())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class ProgressWriter:
    """A live bar with loss, tokens per second and time left; plain lines where there is no terminal."""

    def __init__(self, total: int, start: int = 0) -> None:
        self._total = total
        self._first = start
        self._began = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        if sys.stdout.isatty():
            columns = ("{task.description}", rich.progress.BarColumn(), "{task.completed}/{task.total}")
            self._bar = rich.progress.Progress(*columns, rich.progress.TimeRemainingColumn())
            self._bar.start()
            self._task = self._bar.add_task("starting", total=total, completed=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows `values`."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        seconds = (time.monotonic() - self._began) / max(step - self._first, 1) * (self._total - step)
        print(f"step {step}/{self._total}  {text}  {_clock(seconds)} left", flush=True)

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()


class TensorBoardWriter:
    """Writes TensorBoard event files; needs `pip install elastic-lm[tensorboard]`."""

    def __init__(self, folder: Path) -> None:
        self._writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Passes `values` on to every writer."""
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        """Closes every writer."""
        for writer in self._writers:
            writer.close()


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        return path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is not UTF-8 text ({error}): move it away, and the run begins a new file"
        ) from error


def _step_of(line: str) -> float:
    """Step of a metrics line; infinity for one that a killed process left half written."""
    try:
        return parse_json(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

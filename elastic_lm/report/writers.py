"""Where a run's numbers go: JSON lines on disk, the terminal, TensorBoard, Weights & Biases, a user's own."""

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import rich.progress

from elastic_lm.config.checks import require
from elastic_lm.config.log import LogConfig
from elastic_lm.config.parse import parse_json
from elastic_lm.files.atomic import append_whole, naming, write_text_whole
from elastic_lm.files.python_files import beside

GOODPUT = '"goodput": '  # in lines that divide the time of a run
PER_CHIP = "_per_chip"  # ends names of rates
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # of writers


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
    about to be run again, and so is the line in which an earlier start has divided its time, to which this
    one adds.

    Raises:
      ValueError: the file is damaged; names it.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = [line for line in _lines(path) if _step_of(line) <= resume_step and GOODPUT not in line]
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
        """Shows `values`; the run itself says at its end where its time went."""
        if "goodput" in values:
            return
        # With one device, the rate per chip says nothing new.
        shown = {name: value for name, value in values.items() if values.get(_of_all(name)) != value}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
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


class WandbWriter:
    """Logs to Weights & Biases, where a resumed run goes on; needs `pip install elastic-lm[wandb]`."""

    ID_FILE = "wandb_id.txt"

    def __init__(self, workdir: Path, config: Mapping[str, Any], project: str = "", name: str = "") -> None:
        path = workdir / self.ID_FILE
        known = path.read_text(encoding="utf-8").strip() if path.is_file() else None
        self._run = importlib.import_module("wandb").init(
            project=project or None,
            name=name or workdir.resolve().name,
            id=known,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
        )
        if known is None:
            write_text_whole(path, f"{self._run.id}\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs `values`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run there, and waits until everything is sent."""
        self._run.finish()


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


def check_writers(log: LogConfig) -> None:
    """Refuses writers that cannot be made, before a run begins.

    Raises:
      ValueError: a package or class is missing; names the writer and what to install.
    """
    for i, name in enumerate(log.writers or ()):
        _needed(name, f"log.writers[{i}]")


def make_writers(log: LogConfig, workdir: Path, config: Mapping[str, Any], start: int) -> list[Writer]:
    """The writers that a run names.

    Args:
      log: their names; None = metrics.jsonl, and TensorBoard files where tensorboardX is installed.
      workdir: metrics.jsonl and tensorboard/ go here.
      config: of the whole run, plain values.
      start: steps done before; lines of later steps are dropped.
    """
    names = log.writers
    if names is None:
        names = ("jsonl", "tensorboard") if _is_installed(PACKAGES["tensorboard"]) else ("jsonl",)

    writers: list[Writer] = []
    try:
        for i, name in enumerate(names):
            writers.append(_made(name, f"log.writers[{i}]", log, workdir, config, start))
    except BaseException:
        Writers(writers).close()
        raise
    return writers


def _made(
    name: str, field: str, log: LogConfig, workdir: Path, config: Mapping[str, Any], start: int
) -> Writer:
    if name == "jsonl":
        return JsonlWriter(workdir / "metrics.jsonl", start)
    needed = _needed(name, field)
    if name == "tensorboard":
        return TensorBoardWriter(workdir / "tensorboard")
    if name == "wandb":
        return WandbWriter(workdir, config, log.project, log.name)

    try:
        writer = needed(workdir, config)
    except Exception as error:
        complaint = f"{type(error).__name__}: {error}"
        raise ValueError(f"{field}={name!r}: cannot be made of (workdir, config): {complaint}") from error
    methods = all(callable(getattr(writer, method, None)) for method in ("write", "close"))
    require(methods, field, name, "needs the methods write(step, values) and close()")
    return writer


def _needed(name: str, field: str) -> Any:
    """What a writer needs: a module, or the class of a user's own."""
    if name == "jsonl":
        return None
    if name in PACKAGES:
        package = PACKAGES[name]
        fix = f'needs {package}: pip install "elastic-lm[{name}]"'
        require(_is_installed(package), field, name, fix)
        return package

    module, _, attribute = name.partition(":")
    try:
        with beside(Path("writer.py"), forget=False):  # of the folder that the command runs in
            found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        complaint = f"{type(error).__name__}: {error}"
        raise ValueError(f"{field}={name!r}: {module} cannot be imported: {complaint}") from error
    require(callable(found), field, name, f"{module} has no class {attribute}")
    return found


def _is_installed(package: str) -> bool:
    """Whether a package is there; a folder of its name, such as wandb writes, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


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


def _of_all(name: str) -> str:
    """Name of the rate of all devices, of a rate per chip; "" = it is none."""
    return name.removesuffix(PER_CHIP) if name.endswith(PER_CHIP) else ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

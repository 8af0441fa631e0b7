"""Sweeps: one run for every combination of values, one after the other, and a table of what they gave.

The runs are those of `fit`, each in a folder of its own. They share compiled programs, unless these are kept
nowhere: what does not depend on the values that differ, such as a seed of the data, is compiled once.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from elastic_lm.config.checks import require
from elastic_lm.config.parse import to_dict
from elastic_lm.files.atomic import read_json, write_text_whole
from elastic_lm.files.compilation_cache import use_compilation_cache
from elastic_lm.files.locks import LOCK_FILE, only_process
from elastic_lm.train.config import RunConfig, TaskRun
from elastic_lm.train.identity import FILE as RUN_FILE
from elastic_lm.train.loop import Stopped
from elastic_lm.train.record import CONFIG_FILE, Origin
from elastic_lm.train.run import MODEL_FOLDER, fit

FILE = "sweep.json"
FORMAT = "elastic_lm sweep 1"
SEED = "seed"  # last part of the keys whose values are repetitions of one experiment
LONGEST_NAME = 120
OPENING, CLOSING, QUOTES = "([{", ")]}", "\"'"

Load = Callable[[Mapping[str, str]], tuple[RunConfig | TaskRun, Origin]]


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      values: key -> text of the value, as on the command line.
      config: the run.
      origin: where its config comes from.
    """

    name: str
    values: Mapping[str, str]
    config: RunConfig | TaskRun
    origin: Origin


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
      metrics: of its last held-out evaluation.
      error: why it failed; "" = it did not.
    """

    metrics: Mapping[str, float]
    error: str = ""


def values_of(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """The values of every key that is swept over.

    Args:
      sweeps: "train.seed=0,1,2" each; commas within brackets or quotes do not separate values.

    Raises:
      ValueError: one is no sweep, or names a key or value twice.
    """
    found: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = [value.strip() for value in _split(text)]
        fix = "write KEY=VALUE,VALUE like train.seed=0,1,2"
        require(bool(key.strip() and equals and all(values)), "--sweep", sweep, fix)
        require(key.strip() not in found, "--sweep", sweep, "the key is swept over already; name it once")
        twice = next((value for value in values if values.count(value) > 1), None)
        require(twice is None, "--sweep", sweep, f"names {twice} twice; name each value once")
        found[key.strip()] = values
    return found


def make_members(sweeps: Sequence[str], load: Load) -> list[Member]:
    """The runs of a sweep; all are looked at before any of them starts.

    Args:
      sweeps: as for `values_of`; several make every combination.
      load: gives the run for values by their keys.

    Raises:
      ValueError: a value is refused.
    """
    keys = values_of(sweeps)
    combinations = [dict(zip(keys, values, strict=True)) for values in itertools.product(*keys.values())]
    return [Member(_folder(values), values, *load(values)) for values in combinations]


def run_sweep(
    members: Sequence[Member],
    workdir: Path,
    *,
    stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Outcome]:
    """Trains every run that has not been trained yet, and writes sweep.json after each.

    Args:
      members: from `make_members`.
      workdir: their folders are made here.
      stop: as for `fit`; the sweep ends where a run does.
      say: is told what begins and what fails.

    Returns:
      Outcomes by the names of the runs.

    Raises:
      Stopped: `stop` asked for it; the same call goes on from there.
      ValueError: `workdir` holds a single run, or another process uses it.
    """
    fix = "holds a single run; choose another for the sweep"
    require(not (workdir / RUN_FILE).is_file(), "workdir", str(workdir), fix)
    first = jax.process_index() == 0
    lock = (
        only_process(workdir / LOCK_FILE, workdir, "choose another workdir")
        if first
        else contextlib.nullcontext()
    )
    use_compilation_cache()
    with lock:
        outcomes = _done_before(members, workdir)
        for i, member in enumerate(members):
            where = f"run {i + 1} of {len(members)}, {member.name}"
            if member.name in outcomes:
                say(f"{where}: done before")
                continue

            say(f"{where}:")
            try:
                _, _, metrics = fit(member.config, workdir / member.name, stop=stop, origin=member.origin)
                outcomes[member.name] = Outcome(metrics)
            except Stopped:
                _save(members, outcomes, workdir)
                raise
            except Exception as error:  # one run must not take the others with it
                text = " ".join(str(error).split()) or type(error).__name__
                outcomes[member.name] = Outcome({}, text)
                say(f"{where}: failed: {text}")
            _save(members, outcomes, workdir)
    return outcomes


def table(members: Sequence[Member], outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of every metric, for every combination of the other values.

    Args:
      members: of the sweep.
      outcomes: by the names of the runs; those that failed, or are missing, count for nothing.

    Returns:
      [{"values": of the other keys, "runs": number, "metrics": {name: {"mean", "sd"}}}]; the standard
      deviation is that of a sample, None of a single run.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, float]]] = {}
    for member in members:
        others = tuple((key, value) for key, value in member.values.items() if not _is_seed(key))
        outcome = outcomes.get(member.name)
        groups.setdefault(others, [])
        if outcome is not None and not outcome.error:
            groups[others].append(outcome.metrics)

    rows = []
    for others, runs in groups.items():
        names = dict.fromkeys(name for metrics in runs for name in metrics)
        found = {name: [metrics[name] for metrics in runs if name in metrics] for name in names}
        rows.append(
            {
                "values": dict(others),
                "runs": len(runs),
                "metrics": {
                    name: {
                        "mean": statistics.fmean(each),
                        "sd": statistics.stdev(each) if len(each) > 1 else None,
                    }
                    for name, each in found.items()
                },
            }
        )
    return rows


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table as lines of text: one block per combination with a run that was done, one line per metric."""
    lines = []
    for row in rows:
        if not row["runs"]:
            continue
        values = "  ".join(f"{key}={value}" for key, value in row["values"].items())
        runs = f"{row['runs']} run{'s' if row['runs'] != 1 else ''}"
        lines.append(f"{values or 'all'}  ({runs})")
        width = max(map(len, row["metrics"]), default=0)
        for name, numbers in row["metrics"].items():
            spread = "" if numbers["sd"] is None else f" ± {numbers['sd']:.2g}"
            lines.append(f"  {name:{width}}  {numbers['mean']:.5g}{spread}")
    return lines


def _save(members: Sequence[Member], outcomes: Mapping[str, Outcome], workdir: Path) -> None:
    if jax.process_index():
        return
    runs = [
        {
            "name": member.name,
            "values": dict(member.values),
            "status": "waiting" if outcome is None else "failed" if outcome.error else "done",
            "error": outcome.error if outcome else "",
            "metrics": dict(outcome.metrics) if outcome else {},
        }
        for member in members
        for outcome in [outcomes.get(member.name)]
    ]
    content = {"format": FORMAT, "runs": runs, "table": table(members, outcomes)}
    write_text_whole(workdir / FILE, json.dumps(content, indent=2) + "\n")


def _done_before(members: Sequence[Member], workdir: Path) -> dict[str, Outcome]:
    """Outcomes of the runs that are finished and whose config has not changed since."""
    if not (workdir / FILE).is_file():
        return {}
    stored = read_json(workdir / FILE)
    fix = "is not the file of a sweep; choose another workdir"
    require(stored.get("format") == FORMAT, "workdir", str(workdir / FILE), fix)
    done = {run["name"]: run["metrics"] for run in stored["runs"] if run["status"] == "done"}
    return {
        member.name: Outcome(done[member.name])
        for member in members
        if member.name in done and _is_finished(member, workdir / member.name)
    }


def _is_finished(member: Member, folder: Path) -> bool:
    there = (folder / CONFIG_FILE).is_file() and (folder / MODEL_FOLDER).is_dir()
    return there and read_json(folder / CONFIG_FILE) == json.loads(json.dumps(to_dict(member.config)))


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == SEED


def _folder(values: Mapping[str, str]) -> str:
    """The name of a run's folder: its values; a digest of them stands for what it cannot be called."""
    text = ",".join(f"{key}={value}" for key, value in values.items())
    name = re.sub(r"[^\w.,=+-]", "_", text)[:LONGEST_NAME].lstrip(".")
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _split(text: str) -> list[str]:
    """The parts of a text between commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES:
            quote = character
        elif character in OPENING or character in CLOSING:
            depth += 1 if character in OPENING else -1
        elif character == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += character
    return parts

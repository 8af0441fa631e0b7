"""Rows of a benchmark, the choice of benchmarks, and the file they are written to."""

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import elastic_lm.bench
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.report.machine import hardware, versions

PLUMBING = (
    "decode_programs",
    "drafter_plan",
    "early",
    "forecasts",
    "latency_build",
    "latency_measure",
    "latency_verify",
    "llama_cpp",
    "measured_subnets",
    "model",
    "parts",
    "plan",
    "report",
    "setting_list",
    "timing",
    "topology_plan",
)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measured number beside what it should be.

    Attributes:
      name: `<benchmark>/<what>`.
      measured: our number, in the unit that the benchmark's documentation gives.
      ideal: what the bytes or FLOPs predict, or the competitor's number.
      ratio: measured / ideal, so 1 is as good as the ideal or the competitor; larger is better unless the
        benchmark's documentation says otherwise.
      note: what chance decided about the measurement, where it did.
    """

    name: str
    measured: float
    ideal: float
    ratio: float
    note: str = ""

    @classmethod
    def of(cls, name: str, measured: float, ideal: float) -> "Measurement":
        """A row whose ratio is measured / ideal."""
        return cls(name, measured, ideal, measured / ideal)


@dataclasses.dataclass(frozen=True)
class Options:
    """What every benchmark is told."""

    tiny: bool = False  # a model that only checks that the benchmark runs
    rounds: int = 5  # timed rounds per side
    seed: int = 0  # of weights and prompts
    model: str = ""  # a checkpoint of the user's own, for the benchmarks that take one
    data: tuple[str, ...] = ()  # text of the user's own, likewise; () = the Python standard library


def names() -> list[str]:
    """Benchmarks that exist."""
    modules = [module.name for module in pkgutil.iter_modules(elastic_lm.bench.__path__)]
    return [name for name in modules if name not in PLUMBING]


def run(name: str, options: Options, seen: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Runs one benchmark.

    Args:
      name: one of `names()`.
      options: size, rounds, seed and model.
      seen: called with the result so far after every row.

    Returns:
      {"rows": [{"name", "measured", "ideal", "ratio"}], "hardware", "versions", "options"}; rows that have a
      note have it too.

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: no such benchmark, or one that cannot measure this model.
    """
    if name not in names():
        raise ValueError(f"benchmark {name!r} does not exist: choose from {', '.join(names())}")
    rows: Iterable[Measurement] = importlib.import_module(f"elastic_lm.bench.{name}").rows(options)
    result = {
        "rows": [],
        "hardware": hardware(),
        "versions": versions(),
        "options": dataclasses.asdict(options),
    }
    for row in rows:
        result["rows"].append({key: value for key, value in dataclasses.asdict(row).items() if value != ""})
        if seen:
            seen(result)
    return result


def table(result: dict[str, Any]) -> str:
    """The rows of `run` as aligned text."""
    lines = [("name", "measured", "ideal", "ratio")]
    lines += [
        (row["name"], f"{row['measured']:.4g}", f"{row['ideal']:.4g}", f"{row['ratio']:.3f}")
        for row in result["rows"]
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    notes = [f"{row['name']}: {row['note']}" for row in result["rows"] if "note" in row]
    cells = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*cells, *notes])


def save(result: dict[str, Any], path: str | Path, links: bool = True) -> None:
    """Writes the result of `run` as JSON; a crash never leaves half a file. `links` as in `whole_file`."""
    write_text_whole(path, json.dumps(result, indent=2) + "\n", links)

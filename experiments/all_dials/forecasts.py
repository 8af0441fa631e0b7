"""Where the plan was wrong: its forecasts of configurations against their measured speed, worst first.

COMMAND   python experiments/all_dials/forecasts.py --data FILE --models embedded STORIES260K ... \\
              --add experiments/real_model/bench.json=SmolLM2-135M --out runs/forecasts
HARDWARE  two CPU cores
DURATION  minutes for a model of a few million parameters; eight for SmolLM2-135M
EXPECTED  README.md beside this file

For every model, `elastic_lm.bench.real` forecasts configurations from the times of their parts and then
decodes with them, in turns with full depth. Results that are there are added with `--add FILE=NAME`:
files of `elastic-lm bench real --json`, of `elastic-lm latency verify --json` (sub-networks by a latency
table), and lists of pairs (quickstarts.json beside this file). What a user loses by a wrong forecast is the
second table: the speed of the configuration that the plan would take (the largest forecast, full depth if
none is above 1) against the fastest measured, among the lossless ones and among all.
"""

import argparse
import datetime
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from study import markdown

import elastic_lm as el
from elastic_lm.bench import real
from elastic_lm.bench.report import Options
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.report.machine import hardware, versions

# Rows of other texts, batches and runs are not choices that a user has beside the others.
OTHER = "repeated text|batch|sub-network|quickstart"


class Compared(NamedTuple):
    """A configuration of a model, its speed relative to full depth, and the forecast."""

    model: str
    name: str
    measured: float
    forecast: float

    @property
    def ratio(self) -> float:
        """Measured by forecast."""
        return self.measured / self.forecast


def main() -> None:
    """Measures every model that is not in forecasts.json yet, then prints both tables."""
    args = parse()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "forecasts.json"
    if file.is_file() and not args.resume:
        raise FileExistsError(f"{file}: a study is there; go on with --resume, or choose another --out")
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"models": {}}
    result |= {"hardware": hardware(), "versions": versions()}

    for place in args.models:
        name = Path(place).name
        if name in result["models"]:
            continue
        model, data = place, tuple(args.data)
        if place == "embedded":
            model, data = str(el.embedded_model()), ()
        print(f"{datetime.datetime.now():%H:%M:%S} {name}", flush=True)
        rows = list(real.rows(Options(rounds=args.rounds, model=model, data=data)))
        result["models"][name] = {"date": f"{datetime.date.today()}", "note": rows[-1].note}
        write_text_whole(file, json.dumps(result, indent=1) + "\n")
    found = [one for name, own in result["models"].items() for one in compared(name, own["note"])]
    for given in args.add:
        path, _, name = given.partition("=")
        found += added(json.loads(Path(path).read_text()), name or path)
    result["compared"] = [{**one._asdict(), "ratio": one.ratio} for one in worst_first(found)]
    write_text_whole(file, json.dumps(result, indent=1) + "\n")
    print(tables(found))
    plot(found, str(out / "forecasts.png"))


def parse() -> argparse.Namespace:
    """Command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    found.add_argument("--models", nargs="*", default=["embedded"], help="model folders, or embedded")
    found.add_argument(
        "--data", nargs="*", default=[], help="text files; embedded reads the library of Python"
    )
    found.add_argument("--add", nargs="*", default=[], help="FILE=NAME of results that are there")
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--out", default="runs/forecasts")
    found.add_argument("--resume", action="store_true")
    return found.parse_args()


def compared(model: str, note: str) -> list[Compared]:
    """Configurations of the note of `real/plan`: "NAME MEASURED, FORECAST; ..."."""
    found = []
    for part in note.split("; "):
        name, measured, forecast = re.fullmatch(r"(.*) ([\d.]+), ([\d.]+)", part).groups()  # type: ignore
        found.append(Compared(model, name, float(measured), float(forecast)))
    return found


def added(content: dict[str, Any], model: str) -> list[Compared]:
    """Pairs of a file that another command, or a person, wrote."""
    rows = {row["name"]: row for row in content.get("rows", ())}
    if "real/plan" in rows:
        return compared(model, rows["real/plan"]["note"])
    found = [Compared(model, p["name"], p["measured"], p["forecast"]) for p in content.get("compared", ())]
    if "subnets" in content:
        # The whole model when the table was checked, and when it was built.
        now, then = (rows["latency/full_vs_table"][key] for key in ("measured", "ideal"))
        found += [
            Compared(model, f"sub-network {i}", now / one["measured"], then / one["predicted"])
            for i, one in enumerate(content["subnets"], 1)
        ]
    return found


def worst_first(found: list[Compared]) -> list[Compared]:
    """By how far the forecast was off, in either direction."""
    return sorted(found, key=lambda one: -abs(math.log(one.ratio)))


def tables(found: list[Compared]) -> str:
    """All configurations, and what following the advice costs."""
    rows = [
        [one.model, one.name, f"{one.measured:.3f}", f"{one.forecast:.3f}", f"{one.ratio:.2f}"]
        for one in worst_first(found)
    ]
    lost = []
    for model in dict.fromkeys(one.model for one in found):
        own = [c for c in found if c.model == model and not re.search(OTHER, c.name)]
        if not own:
            continue
        own.append(Compared(model, "full depth", 1.0, 1.0))
        for kind in ("lossless", "any"):
            group = [c for c in own if kind == "any" or c.name == "full depth" or c.name.startswith(kind)]
            taken, best = max(group, key=lambda c: c.forecast), max(group, key=lambda c: c.measured)
            lost.append(
                [
                    model,
                    kind,
                    taken.name,
                    f"{taken.forecast:.2f}",
                    f"{taken.measured:.2f}",
                    best.name,
                    f"{best.measured:.2f}",
                    f"{taken.measured / best.measured:.2f}",
                ]
            )
    header = ["model", "among", "the plan takes", "forecast", "measured", "the fastest", "measured", "ratio"]
    first = markdown(["model", "configuration", "measured", "forecast", "measured / forecast"], rows)
    return f"{first}\n\n{markdown(header, lost)}"


def plot(found: list[Compared], file: str) -> None:
    """Measured over forecast speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5))
    for model in dict.fromkeys(one.model for one in found):
        own = [one for one in found if one.model == model]
        axes.plot(
            [one.forecast for one in own], [one.measured for one in own], "o", markersize=4, label=model
        )
    for one in worst_first(found)[:6]:
        axes.annotate(one.name, (one.forecast, one.measured), (4, 2), textcoords="offset points", fontsize=6)
    ends = [min(one.forecast for one in found), max(one.forecast for one in found)]
    axes.plot(ends, ends, "k-", linewidth=0.8)
    axes.set_xlabel("forecast speed, full depth = 1")
    axes.set_ylabel("measured")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

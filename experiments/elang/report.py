"""Tables (Markdown) and the picture of run.py, from the columns that it measured.

COMMAND   python experiments/elang/report.py runs/elang/results.json.gz

Thresholds are chosen on the rows held back from training (`fit`) and applied to the test rows. Costs are mean
FLOPs per row, the Super's being 1; where the Swift is part of the Super, rows that go on pay for the rest.
"""

import gzip
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from elastic_lm.cascade.sweep import (
    CascadeCurve,
    CascadePoint,
    Measurements,
    like_super,
    most_accurate,
    sweep,
)

matplotlib.use("Agg")
Columns = dict[str, Any]
Study = dict[str, dict[str, list[Columns]]]  # pair of models -> seed by seed
KINDS = ("energy", "max_prob", "entropy", "margin", "random")
SHARES = (0.1, 0.25, 0.5)  # of the rows, to the Super


def main() -> None:
    """Prints the tables and draws curves.png beside the columns."""
    file = Path(sys.argv[1])
    results = json.loads(gzip.decompress(file.read_bytes()))
    print(tables(results["pairs"]))
    plot(results["pairs"], file.with_name("curves.png"))


def rows(columns: Columns, split: str, kind: str) -> Measurements:
    """Measured rows of a split, costs relative to the Super's mean."""
    part = columns["splits"][split]
    whole = statistics.mean(part["cost_super"])
    swift, super_ = (np.asarray(part[k]) / whole for k in ("cost_swift", "cost_super"))
    on = np.asarray(part["cost_on"]) / whole if "cost_on" in part else super_
    return Measurements.of(part["scores"][kind], part["swift"], part["super"], swift, on)


def kinds_of(columns: Columns) -> list[str]:
    """Scores that a pair of models has, the usual ones first."""
    found = list(columns["splits"]["test"]["scores"])
    return [k for k in KINDS if k in found] + [k for k in found if k not in KINDS]


def mean_accuracy(curve: CascadeCurve) -> float:
    """Area under accuracy over the share of rows that go to the Super, from 0 to 1."""
    grid = np.linspace(0, 1, 201)
    return float(np.interp(grid, curve.share_super, curve.accuracy).mean())


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and, where there are several, range."""
    mean = f"{statistics.mean(values):.{digits}f}"
    low, high = (f"{bound:.{digits}f}" for bound in (min(values), max(values)))
    return f"{mean} ({low}-{high})" if len(values) > 1 else mean


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table with right-aligned numbers."""
    all_lines = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in all_lines)


def tables(pairs: dict[str, list[Columns]]) -> str:
    """One table per pair of models, mean (least-most) over seeds."""
    return "\n\n".join(f"### {name}\n\n{models(found)}\n\n{scores(found)}" for name, found in pairs.items())


def models(found: list[Columns]) -> str:
    """Both models alone."""
    parts = [columns["splits"]["test"] for columns in found]
    lines = [
        [
            name,
            spread([statistics.mean(part[key]) for part in parts]),
            spread(
                [statistics.mean(part[f"cost_{key}"]) / statistics.mean(part["cost_super"]) for part in parts]
            ),
            spread([columns["relative_time"] if key == "swift" else 1.0 for columns in found]),
        ]
        for name, key in (("Swift", "swift"), ("Super", "super"))
    ]
    return markdown(["model alone", "quality", "FLOPs", "time"], lines)


def scores(found: list[Columns]) -> str:
    """What every score gives on the test rows."""
    lines = []
    for kind in kinds_of(found[0]):
        curves = [sweep(rows(columns, "test", kind)) for columns in found]
        at = [[accuracy_at(curve, share) for curve in curves] for share in SHARES]
        chosen = [transferred(columns, kind) for columns in found]
        lines.append(
            [
                kind,
                *(spread(values) for values in at),
                spread([mean_accuracy(curve) for curve in curves], 4),
                spread([most_accurate(curve).accuracy for curve in curves]),
                spread([like_super(curve).cost for curve in curves]),
                spread([point.accuracy for point in chosen]),
                spread([point.cost for point in chosen]),
            ]
        )
    shares = [f"{share:.0%} to Super" for share in SHARES]
    best = ["mean over shares", "best", "cost at Super's quality", "fitted: quality", "fitted: cost"]
    return markdown(["score", *shares, *best], lines)


def accuracy_at(curve: CascadeCurve, share: float) -> float:
    """Accuracy where a share of the rows goes to the Super, between the nearest thresholds."""
    return float(np.interp(share, curve.share_super, curve.accuracy))


def transferred(columns: Columns, kind: str) -> CascadePoint:
    """On the test rows, the cheapest threshold that reached the Super's quality on the fit rows."""
    threshold = like_super(sweep(rows(columns, "fit", kind))).threshold
    return rows(columns, "test", kind).at(threshold)


def plot(pairs: dict[str, list[Columns]], file: Path) -> None:
    """Quality over cost of every score; lines are means over seeds, bands their range."""
    from matplotlib import pyplot

    across = min(3, len(pairs))
    down = -(-len(pairs) // across)
    figure, panels = pyplot.subplots(down, across, figsize=(5 * across, 3.8 * down), squeeze=False)
    grid = np.linspace(0, 1, 101)
    for axes, (name, found) in zip(panels.flat, pairs.items(), strict=False):
        for n, kind in enumerate(kinds_of(found[0])):
            curves = [sweep(rows(columns, "test", kind)) for columns in found]
            quality = np.stack([np.interp(grid, c.share_super, c.accuracy) for c in curves])
            cost = np.stack([np.interp(grid, c.share_super, c.cost) for c in curves]).mean(axis=0)
            axes.plot(cost, quality.mean(axis=0), color=f"C{n}", label=kind, linewidth=1.3)
            axes.fill_between(cost, quality.min(axis=0), quality.max(axis=0), color=f"C{n}", alpha=0.12)
        whole = statistics.mean(statistics.mean(c["splits"]["test"]["super"]) for c in found)
        axes.plot([1.0], [whole], "k*", markersize=10, linestyle="", label="Super alone")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("mean FLOPs per row, Super = 1")
        axes.set_ylabel("quality")
        axes.grid(alpha=0.3)
    for axes in list(panels.flat)[len(pairs) :]:
        axes.set_visible(False)
    panels.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

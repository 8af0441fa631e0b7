"""Tables (Markdown) and the picture of run.py, from its results.json.

COMMAND   python experiments/flextron/report.py runs/flextron_embedded/results.json
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
Runs = list[dict[str, Any]]
Values = dict[tuple[str, float], list[dict[str, Any]]]  # (method, budget) -> rows of all seeds
MARKERS = ("o", "s")
ZOOM = 0.7  # nats above the base that the second panel shows
STRONGER = (  # method, what it is compared with
    ("elastic, uniform", "zero-shot, uniform"),
    ("elastic, uniform", "matformer, uniform"),
    ("elastic, knapsack", "zero-shot, knapsack"),
    ("elastic, best uniform", "elastic, uniform"),
    ("elastic, greedy", "elastic, best uniform"),
    ("elastic, knapsack", "elastic, best uniform"),
    ("elastic, knapsack", "elastic, random"),
    ("elastic, uniform", "slice, alone"),
    ("elastic, knapsack", "slice, alone"),
    ("elastic, uniform", "scratch, alone"),
    ("router, end to end", "elastic, random"),
    ("router, end to end", "elastic, knapsack"),
    ("router, surrogate", "elastic, knapsack"),
    ("router, by token", "router, end to end"),
)


def main() -> None:
    """Prints the tables and draws latency.png beside results.json."""
    file = Path(sys.argv[1])
    runs = json.loads(file.read_text())["runs"]
    print(tables(runs))
    plot(runs, file.with_name("latency.png"))


def tables(runs: Runs) -> str:
    """All tables, mean (least-most) over seeds, and over draws of random sub-networks."""
    found = grouped(runs)
    parts = (
        full_table(runs),
        budget_table(found, "nats/token", "loss"),
        budget_table(found, "time, measured", "relative"),
        budget_table(found, "time, by the table", "predicted"),
        ahead_table(runs, found),
    )
    return "\n\n".join(parts)


def spread(values: list[float]) -> str:
    """Mean and, where there are several, range."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else mean


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with right-aligned numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def full_losses(run: dict[str, Any]) -> dict[str, float]:
    """{arm: nats per token of its whole model}; that of zero-shot is the base."""
    return {row["arm"]: row["loss"] for row in run["rows"] if row["how"] == "full"}


def grouped(runs: Runs) -> Values:
    """Rows of sub-networks by method and budget, the largest budget first."""
    found: Values = {}
    for run in runs:
        for row in run["rows"]:
            if row["how"] != "full":
                found.setdefault((f"{row['arm']}, {row['how']}", row["budget"]), []).append(
                    {**row, "seed": run["seed"]}
                )
    return found


def full_table(runs: Runs) -> str:
    """What training did to the whole model."""
    before = [full_losses(run)["zero-shot"] for run in runs]
    rows = [["base", spread(before), ""]]
    for arm in full_losses(runs[0]):
        if arm != "zero-shot":
            after = [full_losses(run)[arm] for run in runs]
            changes = [b - a for a, b in zip(before, after, strict=True)]
            rows.append([arm, spread(after), ", ".join(f"{change:+.4f}" for change in changes)])
    return markdown(["whole model", "nats/token", "change, seed by seed"], rows)


def names(found: Values) -> tuple[list[str], list[float]]:
    """(methods, budgets from the largest)."""
    return list(dict.fromkeys(m for m, _ in found)), sorted({b for _, b in found}, reverse=True)


def budget_table(found: Values, title: str, field: str) -> str:
    """One number of every method at every budget; random sub-networks are not timed."""
    methods, budgets = names(found)
    lines = []
    for method in methods:
        each = [[row[field] for row in found.get((method, b), [])] for b in budgets]
        if any(value is not None for values in each for value in values):
            lines.append([method, *(spread(values) if values else "" for values in each)])
    return markdown([title, *(f"budget {b:g}" for b in budgets)], lines)


def ahead_table(runs: Runs, found: Values) -> str:
    """Differences of losses at equal budgets, seed by seed."""
    budgets, lines = names(found)[1], []
    for pair in STRONGER:
        shared = [b for b in budgets if all((method, b) in found for method in pair)]
        cells = {
            b: [seed_mean(found[pair[0], b], r) - seed_mean(found[pair[1], b], r) for r in runs]
            for b in shared
        }
        listed = [", ".join(f"{d:+.3f}" for d in cells.get(b, [])) for b in budgets]
        if shared:
            lines.append([" minus ".join(pair), *listed])
    return markdown(["difference in nats/token", *(f"budget {b:g}" for b in budgets)], lines)


def seed_mean(rows: list[dict[str, Any]], run: dict[str, Any]) -> float:
    """Mean loss of one seed's rows."""
    return statistics.mean(row["loss"] for row in rows if row["seed"] == run["seed"])


def plot(runs: Runs, file: Path) -> None:
    """Loss over time per token, the whole model's being 1; bars from the least to the most."""
    from matplotlib import pyplot

    found = grouped(runs)
    methods = names(found)[0]
    base = statistics.mean(full_losses(run)["zero-shot"] for run in runs)
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5))
    for axes in panels:
        for n, method in enumerate(methods):
            points = sorted(point(rows) for (m, _), rows in found.items() if m == method)
            times, means, least, most = zip(*points, strict=True)
            below = [mean - low for mean, low in zip(means, least, strict=True)]
            above = [high - mean for mean, high in zip(means, most, strict=True)]
            style = {"marker": MARKERS[n // 10], "markersize": 4, "capsize": 3, "linewidth": 1.2}
            axes.errorbar(times, means, yerr=[below, above], color=f"C{n % 10}", label=method, **style)
        axes.plot([1.0], [base], "k*", markersize=9, linestyle="", label="base, whole")
        axes.set_xlabel("time per decoded token (by the table where not timed), whole model = 1")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out nats per token")
    panels[1].set_ylim(base - 0.05, base + ZOOM)
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def point(rows: list[dict[str, Any]]) -> tuple[float, float, float, float]:
    """(mean time, mean loss, least, most) of one method at one budget; times by the table if not measured."""
    times = [r["predicted"] if r["relative"] is None else r["relative"] for r in rows]
    losses = [r["loss"] for r in rows]
    return statistics.mean(times), statistics.mean(losses), min(losses), max(losses)


if __name__ == "__main__":
    main()

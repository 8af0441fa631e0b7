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
    """All tables, mean (least-most) over seeds."""
    return "\n\n".join((full_table(runs), budget_table(runs), ahead(runs)))


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
    """Rows of sub-networks by method and budget, dearest budget first."""
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


def budget_table(runs: Runs) -> str:
    """Every method at every budget; random sub-networks are timed by the table alone."""
    rows = []
    for (method, budget), found in grouped(runs).items():
        measured = [row["relative"] for row in found if row["relative"] is not None]
        rows.append(
            [
                method,
                f"{budget:g}",
                spread([row["predicted"] for row in found]),
                spread(measured) if measured else "",
                spread([row["loss"] for row in found]),
            ]
        )
    return markdown(["method", "budget", "time, predicted", "time, measured", "nats/token"], rows)


def ahead(runs: Runs) -> str:
    """Differences of losses at equal budgets, seed by seed."""
    found = grouped(runs)
    lines = []
    for method, other in STRONGER:
        for budget in sorted({b for m, b in found if m == method}, reverse=True):
            if (other, budget) in found:
                ours, theirs = found[method, budget], found[other, budget]
                seeds = [run["seed"] for run in runs]
                listed = ", ".join(f"{seed_mean(ours, s) - seed_mean(theirs, s):+.3f}" for s in seeds)
                lines.append(f"- budget {budget:g}: {method} minus {other}: {listed}")
    return "\n".join(lines)


def seed_mean(rows: list[dict[str, Any]], seed: int) -> float:
    """Mean loss of one seed's rows."""
    return statistics.mean(row["loss"] for row in rows if row["seed"] == seed)


def plot(runs: Runs, file: Path) -> None:
    """Loss over time per token, the whole model's being 1; bars from the least to the most of all seeds."""
    from matplotlib import pyplot

    found = grouped(runs)
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for axes in panels:
        for method in dict.fromkeys(method for method, _ in found):
            points = []
            for (m, _), rows in found.items():
                if m == method:
                    times = [r["predicted"] if r["relative"] is None else r["relative"] for r in rows]
                    points.append((statistics.mean(times), [r["loss"] for r in rows]))
            points.sort(key=lambda point: point[0])
            means = [statistics.mean(losses) for _, losses in points]
            below = [mean - min(losses) for mean, (_, losses) in zip(means, points, strict=True)]
            above = [max(losses) - mean for mean, (_, losses) in zip(means, points, strict=True)]
            style = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.2, "label": method}
            axes.errorbar([x for x, _ in points], means, yerr=[below, above], **style)
        for arm in full_losses(runs[0]):
            value = statistics.mean(full_losses(run)[arm] for run in runs)
            axes.plot([1.0], [value], marker="s", markersize=5, linestyle="", label=f"{arm}, whole model")
        axes.set_xlabel("time per decoded token, whole model = 1")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out nats per token")
    trained = [row["loss"] for (m, _), rows in found.items() if m.startswith("elastic") for row in rows]
    base = statistics.mean(full_losses(run)["zero-shot"] for run in runs)
    panels[1].set_ylim(base - 0.1, max(trained) + 0.1)
    panels[1].set_title("the same, the elastic model's range")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

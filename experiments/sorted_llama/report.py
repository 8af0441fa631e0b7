"""Tables (Markdown) and the picture of run.py, from its results.json.

COMMAND   python experiments/sorted_llama/report.py runs/sorted_english/results.json
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
Runs = list[dict[str, Any]]
QUALITY = {
    "loss": "nats/token",
    "accuracy": "accuracy",
    "agreement": "agreement, own full depth",
    "agreement_sft": "agreement, sft",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
}
DYNAMIC = {
    "mean_layers": "mean layers",
    "agreement": "agreement",
    "same_text": "same text",
    "rouge_l": "ROUGE-L",
    "speedup": "tokens/s, full depth = 1",
}


def main() -> None:
    """Prints the tables and draws depths.png beside results.json."""
    file = Path(sys.argv[1])
    runs = json.loads(file.read_text())["runs"]
    print(tables(runs))
    plot(runs, file.with_name("depths.png"))


def tables(runs: Runs) -> str:
    """All tables, mean (least-most) over seeds."""
    parts = (depth_table(runs), dynamic_table(runs), ahead(runs))
    return "\n\n".join(parts)


def spread(values: list[float]) -> str:
    """Mean and, where there are several seeds, range."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else mean


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with right-aligned numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def column(runs: Runs, method: str, index: int, key: str) -> list[float]:
    """One number of one depth of every seed."""
    return [run["depths"][method][index][key] for run in runs]


def depth_table(runs: Runs) -> str:
    """Every method at every depth."""
    depths = [row["layers"] for row in runs[0]["depths"]["sft"]]
    base = ["base", str(depths[-1]), spread([run["base"] for run in runs])]
    rows = [base + [""] * (len(QUALITY) - 1)]
    for method in runs[0]["depths"]:
        for i, n in enumerate(depths):
            rows.append([method, str(n), *(spread(column(runs, method, i, key)) for key in QUALITY)])
    return markdown(["method", "layers", *QUALITY.values()], rows)


def dynamic_table(runs: Runs) -> str:
    """Tokens that leave when a depth is sure of them."""
    rows = [
        [method, *(spread([run["dynamic"][method][key] for run in runs]) for key in DYNAMIC)]
        for method in runs[0]["dynamic"]
    ]
    chosen = [run["calibrated"] for run in runs]
    layers, agreement = (spread([c[key] for c in chosen]) for key in ("mean_layers", "agreement"))
    rows.append([f"the same, held-out text (target {chosen[0]['target']:g})", layers, agreement, "", "", ""])
    return markdown(["dynamic", *DYNAMIC.values()], rows)


def ahead(runs: Runs) -> str:
    """In how many seeds soft has a lower loss than sft+ict, and what it costs at full depth."""
    lines = []
    for i, row in enumerate(runs[0]["depths"]["soft"][:-1]):
        pairs = zip(column(runs, "soft", i, "loss"), column(runs, "sft+ict", i, "loss"), strict=True)
        won = sum(soft < ict for soft, ict in pairs)
        lines.append(f"{row['layers']} layers: loss of soft below sft+ict in {won} of {len(runs)} seeds")
    pairs = zip(runs, column(runs, "soft", -1, "loss"), column(runs, "sft", -1, "loss"), strict=True)
    costs = [f"{soft - sft:+.4f} (seed {run['seed']})" for run, soft, sft in pairs]
    return "\n".join(f"- {line}" for line in [*lines, f"full depth, loss of soft - sft: {', '.join(costs)}"])


def plot(runs: Runs, file: Path) -> None:
    """Loss and ROUGE-L over depth; bars from the least to the most of all seeds."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for axes, key, label in zip(
        panels, ("loss", "rouge_l"), ("nats per response token", "ROUGE-L"), strict=True
    ):
        for method, rows in runs[0]["depths"].items():
            values = [column(runs, method, i, key) for i in range(len(rows))]
            means = [statistics.mean(v) for v in values]
            below = [mean - min(v) for mean, v in zip(means, values, strict=True)]
            above = [max(v) - mean for mean, v in zip(means, values, strict=True)]
            depths = [row["layers"] for row in rows]
            axes.errorbar(depths, means, yerr=[below, above], marker="o", capsize=3, label=method)
            axes.set_xticks(depths)
        axes.set_xlabel("layers")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

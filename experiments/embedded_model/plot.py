"""Draws the loss of training runs that each continue the one before: python plot.py METRICS_JSONL... PNG"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = {
    "final": "full model",
    "exit_9": "after layer 9",
    "exit_6": "after layer 6",
    "exit_3": "after layer 3",
}


def main(runs: list[Path], png: Path) -> None:
    """Reads metrics.jsonl of every run and writes the figure."""
    rows, before = [], 0
    _, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for run in runs:
        own = [json.loads(line) for line in run.read_text().splitlines()]
        rows += [row | {"step": before + row["step"]} for row in own]
        before = rows[-1]["step"]
        if run != runs[-1]:
            axis.axvline(before, color="0.8", linewidth=1)
    for part, label in PARTS.items():
        trained, held_out = (curve(rows, f"{prefix}/{part}") for prefix in ("loss", "eval_loss"))
        (line,) = axis.plot(*trained, linewidth=1)
        axis.plot(*held_out, "o", markersize=4, color=line.get_color(), label=f"{label}, held out")
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()
    plt.savefig(png, dpi=120)


def curve(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that hold `name`."""
    kept = [row for row in rows if name in row]
    return [row["step"] for row in kept], [row[name] for row in kept]


if __name__ == "__main__":
    *runs, png = map(Path, sys.argv[1:])
    main(runs, png)

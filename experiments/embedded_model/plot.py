"""Draws the loss curves of a training run: python plot.py METRICS_JSONL PNG"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(metrics: Path, png: Path) -> None:
    """Reads metrics.jsonl and writes the figure."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    _, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for part, label in (("final", "full model"), ("exit_6", "after layer 6"), ("exit_3", "after layer 3")):
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
    main(Path(sys.argv[1]), Path(sys.argv[2]))

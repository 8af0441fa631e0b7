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
    for name, label, style in (("loss", "training text", "-"), ("eval_loss", "held-out text", "o")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()
    plt.savefig(png, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

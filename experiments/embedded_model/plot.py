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
        for prefix, style in (("loss", "-"), ("eval_loss", "o")):
            points = [(row["step"], row[f"{prefix}/{part}"]) for row in rows if f"{prefix}/{part}" in row]
            (line,) = axis.plot(*zip(*points, strict=True), style, linewidth=1, markersize=4)
            if style == "o":
                line.set(color=colour, label=f"{label}, held out")
            colour = line.get_color()
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()
    plt.savefig(png, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Draws the pictures of the first page.

    elastic-lm quickstart --exits 3,6,9 --out runs/three
    python docs/images/draw.py runs/three

`text.svg` is the continuation of a file that nothing was trained on, at 95 % agreement with the full model.
`curve.png` shows the quickstart's table in docs/results.md.
"""

import io
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

import elastic_lm as el
from elastic_lm.report.plots import place_labels

HERE = Path(__file__).parent
TARGET, TOKENS = 0.95, 160
WIDTH = 100  # characters

# Target, agreement, speed against full depth: median, least and most of five runs.
QUICKSTART = (
    ("90 %", 0.897, 1.24, 1.15, 1.29),
    ("95 %", 0.948, 1.21, 1.12, 1.26),
    ("98 %", 0.978, 1.17, 1.16, 1.19),
    ("99 %", 0.988, 1.13, 1.06, 1.16),
    ("99.5 %", 0.995, 1.07, 1.00, 1.10),
)


def draw_text(folder: Path) -> None:
    """Coloured text of the model that a quickstart left in `folder`."""
    model, params = el.load(folder / "model")
    tokenizer = el.Tokenizer.load(folder / "model")
    policy = el.ConfidenceExit.load(folder / "thresholds.json").at(TARGET)
    sampler = el.Sampler(model, params, tokenizer, exit=policy)

    source = next(file for file in el.data.stdlib_files("test") if "class " in file.read_text())
    prompt = source.read_text()[source.read_text().index("class ") :][:160]
    sample = sampler.sample(prompt, TOKENS, temperature=0.6, seed=4)
    print(sample.stats)

    n_layers = model.config.n_layers
    ids = tokenizer.encode(prompt, bos=True)
    spans = el.evaluate.spans(tokenizer.decode, sample.tokens, sample.exit_layers, prompt=ids)
    exits = [e.layer for e in model.config.exits]
    legend = el.evaluate.legend(exits, n_layers)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor")
    console.print(Text(prompt, style="dim"), end="")
    for part in (spans, [("\n\n", n_layers)], legend):
        console.print(Text.from_ansi(el.evaluate.to_ansi(part, n_layers, exits=exits)), end="")
    picture = console.export_svg(title="colour = layers that a token needed")
    # The fonts of the page that shows it, instead of some from another host.
    (HERE / "text.svg").write_text(re.sub(r" *@font-face {.*?}\n", "", picture, flags=re.DOTALL))


def draw_curve() -> None:
    """Speed over agreement, with the range of the runs."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    targets, agreement, speed, least, most = zip(*QUICKSTART, strict=True)
    below = [median - low for median, low in zip(speed, least, strict=True)]
    above = [high - median for median, high in zip(speed, most, strict=True)]
    x = [100 * share for share in agreement]
    axes.errorbar(x, speed, (below, above), fmt="o-", color="#1b6ca8", capsize=3)
    axes.axhline(1.0, color="#888888", linewidth=1, linestyle="--")
    axes.set_title("The embedded model on two CPU cores: median and range of five runs", fontsize=10)
    axes.set_xlabel("agreement with the full model (%)")
    axes.set_ylabel("speed, full depth = 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.15)
    labels = [f"target {target}" for target in targets]
    place_labels(figure, axes, list(zip(labels, zip(x, speed, strict=True), strict=True)))
    figure.savefig(HERE / "curve.png", dpi=150)


if __name__ == "__main__":
    draw_curve()
    draw_text(Path(sys.argv[1]))

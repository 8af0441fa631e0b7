"""Plots of a model with exits: quality against speed, and the depths at which tokens leave."""

import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elastic_lm.files.atomic import write_bytes_whole

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # of Okabe and Ito, told apart by colour-blind readers

# Where a label may stand: points to the right and up of its point, and how it is aligned there.
PLACES = (
    *((x, y, "left" if x > 0 else "right", "bottom" if y > 0 else "top") for y in (6, -6) for x in (6, -6)),
    *((0, y, "center", "bottom" if y > 0 else "top") for y in (10, -10)),
    *((x, 0, "left" if x > 0 else "right", "center") for x in (9, -9)),
    *((x, y, "left" if x > 0 else "right", "bottom" if y > 0 else "top") for y in (22, -22) for x in (6, -6)),
)


@dataclasses.dataclass(frozen=True)
class SpeedPoint:
    """One point of a quality-speed curve.

    Example:
      ```python
      from elastic_lm.evaluate import SpeedPoint

      SpeedPoint(agreement=0.99, speedup=1.4, label="threshold 0.9")
      ```
    """

    agreement: float  # share of tokens equal to the full model's, 0 .. 1
    speedup: float  # against full depth
    label: str = ""  # written beside the point
    spread: float = 0.0  # half the height of the error bar


def quality_speed(
    series: Mapping[str, Sequence[SpeedPoint]],
    path: str | Path,
    *,
    title: str = "Early exits: speed-up against agreement",
    y_label: str = "speed-up against full depth",
    measured_on: str = "",
) -> None:
    """Draws speed-up over agreement, one line per series, and full depth as a dashed line.

    Args:
      series: name -> points; the legend is left out where there is only one.
      path: PNG file to write.
      title: above the axes.
      y_label: what `SpeedPoint.speedup` measures.
      measured_on: the model and the device, written below the title.

    Example:
      ```python
      import pathlib
      import tempfile

      from elastic_lm.evaluate import SpeedPoint, quality_speed

      points = [SpeedPoint(0.95, 1.8, "95 %", spread=0.1), SpeedPoint(0.99, 1.4, "99 %", spread=0.1)]
      with tempfile.TemporaryDirectory() as folder:
          quality_speed({"calibrated": points}, pathlib.Path(folder) / "curve.png", measured_on="a CPU")
      ```
    """
    figure, axes = new_figure(title, measured_on)
    labels = []
    for (name, points), colour in zip(series.items(), itertools.cycle(COLOURS), strict=False):
        points = sorted(points, key=lambda p: p.agreement)
        x, y = [100 * p.agreement for p in points], [p.speedup for p in points]
        bars = [p.spread for p in points] if any(p.spread for p in points) else None
        axes.errorbar(x, y, bars, fmt="o-", color=colour, capsize=3, label=name)
        labels += [(p.label, place) for p, place in zip(points, zip(x, y, strict=True), strict=True)]

    axes.axhline(1.0, color="#888888", linewidth=1, linestyle="--")
    axes.set_xlabel("agreement with the full model (%)")
    axes.set_ylabel(y_label)
    axes.margins(0.15)
    if len(series) > 1:
        axes.legend(frameon=False)
    place_labels(figure, axes, labels)
    save_figure(figure, path)


def place_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Writes texts beside points, each where it covers least: no other text, no point, no line, no edge.

    Args:
      figure: of the axes.
      axes: everything else is drawn already.
      labels: (text, point in data coordinates).
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # where things are is known after they were drawn
    renderer = canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    taken = [text.get_window_extent(renderer) for text in (axes.get_legend(),) if text is not None]
    points = [axes.transData.transform(point) for _, point in labels]
    paths = [line.get_path().interpolated(64).transformed(line.get_transform()) for line in axes.lines]
    paths += [
        path.interpolated(64).transformed(bars.get_transform())
        for bars in axes.collections
        for path in bars.get_paths()
    ]
    lines = [np.asarray(path.vertices).reshape(-1, 2) for path in paths]
    covered = np.concatenate([np.asarray(points).reshape(-1, 2), *lines])

    for text, point in labels:
        best: tuple[float, Any, Any] | None = None
        for dx, dy, across, along in PLACES:
            note = axes.annotate(
                text, point, (dx, dy), textcoords="offset points", fontsize=8, ha=across, va=along
            )
            box = note.get_window_extent(renderer).padded(1)
            cost = 100.0 * sum(box.overlaps(other) for other in taken)
            cost += float(np.sum(np.all((covered > box.min) & (covered < box.max), axis=1)))
            cost += 50.0 * (not (inside.contains(*box.min) and inside.contains(*box.max)))
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = cost, note, box
            else:
                note.remove()
        assert best is not None
        taken.append(best[2])


def exit_depths(
    counts: Mapping[int, int], n_layers: int, path: str | Path, *, title: str = "Where tokens leave the model"
) -> None:
    """Draws the share of tokens per depth.

    Args:
      counts: depth in layers -> tokens emitted there.
      n_layers: layers of the full model.
      path: PNG file to write.
      title: above the axes.

    Raises:
      ValueError: there is no token.

    Example:
      ```python
      import pathlib
      import tempfile

      from elastic_lm.evaluate import exit_depths

      with tempfile.TemporaryDirectory() as folder:
          exit_depths({3: 60, 6: 30, 12: 10}, 12, pathlib.Path(folder) / "depths.png")
      ```
    """
    total = sum(counts.values())
    if total == 0:
        raise ValueError(f"counts={dict(counts)}: no tokens to draw")

    figure, axes = new_figure(title)
    depths = sorted({*counts, n_layers})
    shares = [100 * counts.get(depth, 0) / total for depth in depths]
    colours = ["#888888" if depth == n_layers else COLOURS[0] for depth in depths]

    bars = axes.bar([str(depth) for depth in depths], shares, color=colours, width=0.6)
    axes.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=2)
    axes.set_xlabel(f"layers run before the token was chosen (of {n_layers})")
    axes.set_ylabel(f"share of {total} tokens (%)")
    axes.margins(y=0.12)
    save_figure(figure, path)


def new_figure(title: str, below: str = "") -> tuple[Figure, Axes]:
    """A figure in the style of all plots, with one pair of axes.

    Args:
      title: above the axes.
      below: a smaller line below the title, such as what was measured.
    """
    # Without pyplot, which would choose a backend and keep the figure for ever.
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    if below:
        figure.suptitle(title, fontsize=12)
        axes.set_title(below, fontsize=8, color="#555555")
    else:
        axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure to a file that appears complete or not at all.

    Args:
      figure: what is drawn.
      path: its suffix says the format; without one, `.png` is added, as Matplotlib does.
    """
    path = Path(path) if Path(path).suffix else Path(f"{path}.png")
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=150)
    write_bytes_whole(path, image.getvalue())

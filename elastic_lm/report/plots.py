"""Plots of a model with exits: quality against speed, and the depths at which tokens leave."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elastic_lm.files.atomic import write_bytes_whole

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d6a9f")


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
    title: str = "Early exits: agreement against speed",
    y_label: str = "speed-up against full depth",
) -> None:
    """Draws speed-up over agreement, one line per series, and full depth as a dashed line.

    Args:
      series: name -> points; the legend is left out where there is only one.
      path: PNG file to write.
      title: above the axes.
      y_label: what `SpeedPoint.speedup` measures.

    Example:
      ```python
      import pathlib
      import tempfile

      from elastic_lm.evaluate import SpeedPoint, quality_speed

      points = [SpeedPoint(0.95, 1.8, "95 %"), SpeedPoint(0.99, 1.4, "99 %")]
      with tempfile.TemporaryDirectory() as folder:
          quality_speed({"calibrated": points}, pathlib.Path(folder) / "curve.png")
      ```
    """
    figure, axes = new_figure(title)
    for (name, points), colour in zip(series.items(), COLOURS, strict=False):
        points = sorted(points, key=lambda p: p.agreement)
        x, y = [100 * p.agreement for p in points], [p.speedup for p in points]
        bars = [p.spread for p in points] if any(p.spread for p in points) else None
        axes.errorbar(x, y, bars, fmt="o-", color=colour, capsize=3, label=name)
        for point, place in zip(points, zip(x, y, strict=True), strict=True):
            axes.annotate(point.label, place, (6, 6), textcoords="offset points", fontsize=8)

    axes.axhline(1.0, color="#888888", linewidth=1, linestyle="--")
    axes.set_xlabel("agreement with the full model (%)")
    axes.set_ylabel(y_label)
    axes.margins(0.12)
    if len(series) > 1:
        axes.legend(frameon=False)
    save_figure(figure, path)


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


def new_figure(title: str) -> tuple[Figure, Axes]:
    """A figure in the style of all plots, with one pair of axes."""
    # Without pyplot, which would choose a backend and keep the figure for ever.
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
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

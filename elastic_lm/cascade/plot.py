"""The curve of a cascade: accuracy against cost."""

from collections.abc import Sequence
from pathlib import Path

from elastic_lm.cascade.joint import JointPoint
from elastic_lm.cascade.sweep import CascadePoint
from elastic_lm.report.plots import COLOURS, new_figure, save_figure


def plot_cascade(
    points: Sequence[CascadePoint | JointPoint],
    chosen: CascadePoint | JointPoint | None,
    path: str | Path,
    *,
    unit: str = "flops",
    title: str = "Swift and Super: accuracy against cost",
) -> None:
    """Draws accuracy over mean cost, from the Swift alone to the Super alone, as a PNG file.

    Of more than two models it is the best accuracy for each cost.

    Args:
      points: of a rule's curve, in its order.
      chosen: the point to mark, with its share of records; None = none is marked.
      path: the file to write.
      unit: of the costs.
      title: above the axes.

    Example:
      ```python
      import pathlib
      import tempfile

      from elastic_lm.cascade import Answer, Function, measure_cascade, plot_cascade

      swift = Function(lambda record: Answer(0, {"energy": -float(record["n"])}, cost=1.0))
      super_ = Function(lambda record: record["label"], cost=10.0)
      labelled = [{"n": n, "label": int(n > 6)} for n in range(10)]
      pair = measure_cascade(swift, super_, labelled, lambda record, output: output == record["label"])
      rule = pair.fit(super_accuracy=True)

      with tempfile.TemporaryDirectory() as folder:
          plot_cascade(rule.curve, rule.measured, pathlib.Path(folder) / "curve.png")
      ```
    """
    figure, axes = new_figure(title)
    axes.plot([p.cost for p in points], [100 * p.accuracy for p in points], color=COLOURS[0])

    joint = isinstance(points[0], JointPoint)
    ends = ("cheapest", "most accurate") if joint else ("Swift alone", "Swift and Super always")
    for point, name in zip((points[0], points[-1]), ends, strict=True):
        place = (point.cost, 100 * point.accuracy)
        axes.plot(*place, "o", color="#888888")
        axes.annotate(name, place, (6, -12), textcoords="offset points", fontsize=8)
    if chosen is not None:
        place = (chosen.cost, 100 * chosen.accuracy)
        axes.plot(*place, "o", color=COLOURS[1])
        text = f"{chosen.share_super:.1%} to the Super"
        axes.annotate(text, place, (6, 6), textcoords="offset points", fontsize=8)

    axes.set_xlabel(f"mean {unit} per record")
    axes.set_ylabel("accuracy (%)")
    axes.margins(0.15)
    save_figure(figure, path)

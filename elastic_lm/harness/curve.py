"""Accuracy against compute: a task at every depth of a model, which is read once, and of its sub-networks.

What a depth costs is counted over the rows that the task has read, each by itself:

    FLOPs = sum over rows of T tokens with M scored ones of  layers up to the depth (T) + vocabulary head (M)

as a share of the whole model's over the same rows. The exits' own modules are not counted.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.cost.sequences import head_flops, layer_flops
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.harness.model import HarnessModel
from elastic_lm.harness.tasks import own_results, run_tasks
from elastic_lm.report.plots import COLOURS, new_figure, save_figure

# What a curve shows of a task, the first of them that it has.
SHOWN = ("acc_norm", "acc", "exact_match")
MARKERS = "osD^vPX*"


@dataclasses.dataclass(frozen=True)
class TaskPoint:
    """A task at one depth of one model.

    Attributes:
      kind: "exit", "full" or "thresholds".
      layers: that ran, in layers of the model that runs; with thresholds the mean over scored tokens, and
        None where none was scored.
      results: numbers by task and metric; a group has one entry for itself and one for each of its tasks.
      flops_share: of the whole model's FLOPs; None = not known, as for generated text and thresholds.
      tokens: scored tokens.
    """

    kind: str
    layers: float | None
    results: Mapping[str, Mapping[str, float]]
    flops_share: float | None
    tokens: int


def depth_curve(
    model: HarnessModel,
    tasks: Any,
    whole: ModelConfig,
    *,
    thresholds: ConfidenceExit | None = None,
    **how: Any,
) -> list[TaskPoint]:
    """Measures tasks at every exit, at full depth, and with thresholds; every text is read once.

    Text that a task lets the model generate is generated anew at every depth.

    Args:
      model: made with `remember=True`, and with the thresholds where there are some.
      tasks: from `load_tasks`.
      whole: the model whose FLOPs are the unit.
      thresholds: also measured.
      **how: as in `run_tasks`: `limit`, `num_fewshot`, `chat`.

    Returns:
      The exits in order of depth, full depth, and the thresholds.
    """
    last = len(model.layers) - 1
    readings = [("full" if i == last else "exit", model.at(i)) for i in range(last + 1)]
    if thresholds is not None:
        readings.append(("thresholds", model.with_thresholds(thresholds)))
    points = [task_point(kind, reading, tasks, whole, **how) for kind, reading in readings]
    model.forget()
    return points


def task_point(kind: str, model: HarnessModel, tasks: Any, whole: ModelConfig, **how: Any) -> TaskPoint:
    """Measures tasks at one reading of a model; the arguments are those of `depth_curve`."""
    model.seen.clear()
    results = own_results(run_tasks(model, tasks, **how))
    depths = model.layers
    tokens = [depths[column] for _, columns in model.seen for column in columns]
    # Generated text is not scored, and at an exit it is of one depth, too.
    layers = float(sum(tokens)) / len(tokens) if tokens else model.depth
    share = None
    if tokens and layers is not None and kind != "thresholds":
        rows = [(scores.length, len(columns)) for scores, columns in model.seen]
        own = sum(_flops(model.config, t, m, int(layers)) for t, m in rows)
        share = own / sum(_flops(whole, t, m, whole.n_layers) for t, m in rows)
    model.seen.clear()
    return TaskPoint(kind, layers, results, share, len(tokens))


def _flops(config: ModelConfig, tokens: int, scored: int, layers: int) -> int:
    return layer_flops(config, tokens, 0, layers) + head_flops(config, scored)


def shown_metric(numbers: Mapping[str, float]) -> str:
    """The metric of a task that a curve shows."""
    named = [name for name in SHOWN if name in numbers]
    return named[0] if named else next(name for name in numbers if name != "rows")


def draw_curve(
    parts: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, *, measured_on: str = ""
) -> None:
    """Draws the accuracy of every task against the share of the whole model's FLOPs.

    Args:
      parts: name of a model, such as "whole model" -> its depths, each with "flops_share" by task, and
        "tasks", the numbers by task and metric.
      path: file to write; its suffix says the format.
      measured_on: the model and the data, below the title.
    """
    figure, axes = new_figure("Tasks: accuracy against compute", measured_on)
    tasks = list(dict.fromkeys(task for depths in parts.values() for d in depths for task in d["tasks"]))
    for i, task in enumerate(tasks):
        colour, metric = COLOURS[i % len(COLOURS)], ""
        for (name, depths), marker in zip(parts.items(), MARKERS * len(parts), strict=False):
            known = [d for d in depths if d["flops_share"].get(task) is not None and task in d["tasks"]]
            if not known:
                continue
            metric = metric or shown_metric(known[0]["tasks"][task])
            x = [100 * d["flops_share"][task] for d in known]
            y = [100 * d["tasks"][task][metric] for d in known]
            line = "-" if i < len(COLOURS) else "--"
            label = f"{task} ({metric})" + (f", {name}" if len(parts) > 1 else "")
            axes.plot(x, y, line, marker=marker, color=colour, label=label, markersize=5)
    axes.set_xlabel("FLOPs, share of the whole model's (%)")
    axes.set_ylabel("accuracy (%)")
    axes.margins(0.05)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7)
    save_figure(figure, path)

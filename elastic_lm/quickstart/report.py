"""What a quickstart run leaves behind: report.json, the table, the coloured text, the curve."""

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.results import Sample, sample_spans
from elastic_lm.depth.forecasting import NO_GAIN
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.quickstart.options import Options
from elastic_lm.report import colour as render
from elastic_lm.report.machine import hardware, versions
from elastic_lm.report.plots import SpeedPoint, quality_speed


@dataclasses.dataclass(frozen=True)
class Target:
    """One row of the table: what a target agreement costs and gives.

    Attributes:
      target_agreement: asked of calibration.
      agreement: share of held-out test tokens equal to the full model's choice.
      mean_layers: mean depth of the generated tokens.
      tokens_per_s: generated tokens per second, median.
      speedup: speed over that of full depth, median over rounds in which both took turns.
      generated_agreement: share of the generated tokens equal to the full model's choice.
      thresholds: one per exit; above 1 = the exit is not used.
      dial: "exits", or "preview" of the vocabulary head.
    """

    target_agreement: float
    agreement: float
    mean_layers: float
    tokens_per_s: float
    speedup: float
    generated_agreement: float
    thresholds: tuple[float, ...]
    dial: str = "exits"


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a run measured.

    Attributes:
      seconds_total: wall-clock time of the whole run.
      full_depth_layers: layers of the model.
      full_depth_tokens_per_s: plain decoding without exits, median.
      targets: one row per target agreement.
      steps: seconds per step of the run.
      model: where the model came from, its size and exits.
      plan: what was forecast before anything was tuned; None for the model that comes with the package.
    """

    seconds_total: float
    full_depth_layers: int
    full_depth_tokens_per_s: float
    targets: list[Target]
    steps: dict[str, float]
    model: dict[str, Any]
    plan: dict[str, Any] | None = None

    @property
    def recommended(self) -> Target | None:
        """The fastest setting from 99 % on, else the fastest of the others; None = full depth."""
        faster = [row for row in self.targets if row.speedup > NO_GAIN]
        near = [row for row in faster if row.target_agreement >= 0.99]
        return max(near or faster, key=lambda row: row.speedup, default=None)


def save(report: Report, options: Options, path: Path) -> None:
    """Writes report.json: the report, the options, hardware and versions.

    Args:
      report: what was measured.
      options: what was asked for, under `config`.
      path: the file; replaced where it exists.
    """
    content = {
        **dataclasses.asdict(report),
        "recommended": recommendation(report),
        "config": dataclasses.asdict(options),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_text_whole(path, json.dumps(content, indent=2) + "\n")


def recommendation(report: Report) -> dict[str, Any]:
    """The recommended setting as JSON values, which is never slower than full depth."""
    row = report.recommended
    if row is None:
        return {"dial": "full depth", "speedup": 1.0, "agreement": 1.0}
    return {
        "dial": row.dial,
        "target_agreement": row.target_agreement,
        "speedup": row.speedup,
        "agreement": row.agreement,
        "generated_agreement": row.generated_agreement,
    }


def show_table(report: Report, console: Console) -> None:
    """Prints target -> agreement, mean layers, tokens/s, speed-up.

    Args:
      report: what was measured.
      console: where the table goes.
    """
    table = Table(box=rich.box.SIMPLE_HEAD, title="Measured against full depth", title_justify="left")
    for heading in ("target", "dial", "agreement", "generated", "mean layers", "tokens/s", "speed-up"):
        table.add_column(heading, justify="right")
    layers, rate = report.full_depth_layers, report.full_depth_tokens_per_s
    table.add_row("full depth", "", "100 %", "100 %", f"{layers}", f"{rate:.0f}", "1.00x")
    for row in report.targets:
        table.add_row(
            f"{100 * row.target_agreement:g} %",
            row.dial,
            f"{100 * row.agreement:.2f} %",
            f"{100 * row.generated_agreement:.2f} %",
            f"{row.mean_layers:.2f}",
            f"{row.tokens_per_s:.0f}",
            f"{row.speedup:.2f}x",
        )
    console.print(table)
    best = report.recommended
    if best is None:
        console.print("[bold]Recommended: full depth.[/] No setting was measured to be faster.")
    else:
        console.print(
            f"[bold]Recommended: {best.dial} at {100 * best.target_agreement:g} %[/], "
            f"{best.speedup:.2f} times as fast as full depth"
        )


def show_text(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sample: Sample,
    depths: Sequence[int],
    n_layers: int,
    colours: render.Colours,
) -> str:
    """A prompt and its continuation for the terminal, coloured by depth, with the legend.

    Args:
      tokenizer: of the model.
      prompt: token ids.
      sample: what follows them.
      depths: layers of every exit and of the full model, for the legend.
      n_layers: layers of the full model.
      colours: what the terminal shows.

    Returns:
      Text with terminal escapes.
    """
    parts = sample_spans(tokenizer, prompt, sample)
    text = tokenizer.decode(prompt) + render.to_ansi(parts, n_layers, colours)
    return f"{text}\n\n{render.to_ansi(render.legend(depths, n_layers), n_layers, colours)}"


def save_texts(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    samples: Mapping[float, Sequence[Sample]],
    depths: Sequence[int],
    n_layers: int,
    path: Path,
) -> None:
    """Writes an HTML page with every prompt continued at every target, coloured by depth.

    Args:
      tokenizer: of the model.
      prompts: token ids of each.
      samples: target agreement -> one continuation per prompt.
      depths: layers of every exit and of the full model, for the legend.
      n_layers: layers of the full model.
      path: the file; replaced where it exists.
    """
    blocks = [render.to_html(render.legend(depths, n_layers), n_layers)]
    for i, prompt in enumerate(prompts):
        blocks.append(f"<h2>Prompt {i + 1}</h2><pre>{html.escape(tokenizer.decode(prompt))}</pre>")
        for target, rows in samples.items():
            parts = sample_spans(tokenizer, prompt, rows[i])
            blocks.append(f"<h3>target {100 * target:g} %</h3>" + render.to_html(parts, n_layers))
    page = '<!doctype html><meta charset="utf-8"><title>Text by exit depth</title>\n' + "\n".join(blocks)
    write_text_whole(path, page + "\n")


def save_curve(report: Report, path: Path) -> None:
    """Draws speed-up over agreement, one point per target.

    Args:
      report: what was measured.
      path: the image; replaced where it exists.
    """
    curves: dict[str, list[SpeedPoint]] = {}
    for row in report.targets:
        label = f"{100 * row.target_agreement:g} %\n{row.mean_layers:.1f} layers"
        curves.setdefault(row.dial, []).append(SpeedPoint(row.agreement, row.speedup, label))
    quality_speed(curves, path)

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
from elastic_lm.quickstart.settings import name_of
from elastic_lm.report import colour as render
from elastic_lm.report.machine import hardware, versions
from elastic_lm.report.plots import SpeedPoint, quality_speed
from elastic_lm.report.terminal import shown

MISSED = 0.1  # of the disagreements that a target allows, so many more are within what text varies
STYLE = "<style>:root { color-scheme: light dark } body { font-family: sans-serif; max-width: 60em }</style>"
NEAR = 0.99  # agreement from which on a setting is preferred to faster ones


@dataclasses.dataclass(frozen=True)
class Target:
    """One row of the table: what a target agreement costs and gives.

    Attributes:
      target_agreement: asked of calibration; 1 = lossless.
      agreement: share of held-out test tokens equal to the full model's choice.
      mean_layers: mean depth of the generated tokens.
      tokens_per_s: generated tokens per second, median.
      speedup: speed over that of full depth, median over rounds in which both took turns.
      generated_agreement: share of the generated tokens equal to the full model's choice.
      thresholds: one per exit; above 1 = the exit is not used.
      dial: "exits", "preview" of the vocabulary head, or lossless "lookup" in the text itself.
      predicted: speed-up by the bytes of weights that a token reads, beside the measured one.
      repeats: share of runs of 4 generated tokens that occurred before in their text.
      degenerate: why the generated text speaks against this setting; "" = it does not.
      spread: half of what the middle half of the rounds' speed-ups spans.
      gb_per_s: gigabytes of weights and caches that decoding read per second, at least; None = not known.
    """

    target_agreement: float
    agreement: float
    mean_layers: float
    tokens_per_s: float
    speedup: float
    generated_agreement: float
    thresholds: tuple[float, ...]
    dial: str = "exits"
    predicted: float = 1.0
    repeats: float = 0.0
    degenerate: str = ""
    spread: float = 0.0
    gb_per_s: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        return name_of(self.dial, self.target_agreement)

    @property
    def refused(self) -> str:
        """Why this setting is not recommended, however fast it is; "" = it may be."""
        if self.agreement < self.target_agreement - MISSED * (1 - self.target_agreement):
            return f"agreement is {self.agreement:.2%} on text that nothing was fitted on"
        return self.degenerate


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a run measured.

    Attributes:
      seconds_total: wall-clock time of the whole run.
      full_depth_layers: layers of the model.
      full_depth_tokens_per_s: plain decoding without exits, median.
      targets: one row per setting that was measured.
      steps: seconds per step of the run.
      model: where the model came from, its size and exits.
      plan: what was forecast before anything was tuned; None for the model that comes with the package.
      timed: prompts, new tokens per prompt, and rounds in which all settings took turns.
      measured_on: the model, the workload and the device in one line, for pictures.
      full_depth_gb_per_s: gigabytes that decoding at full depth read per second; None = not known.
    """

    seconds_total: float
    full_depth_layers: int
    full_depth_tokens_per_s: float
    targets: list[Target]
    steps: dict[str, float]
    model: dict[str, Any]
    plan: dict[str, Any] | None = None
    timed: dict[str, int] = dataclasses.field(default_factory=dict)
    measured_on: str = ""
    full_depth_gb_per_s: float | None = None

    def fastest(self, target: float) -> Target | None:
        """The fastest setting that keeps a target agreement; None = full depth, within what timing varies.

        Args:
          target: agreement with the full model; settings for a higher one count too.
        """
        kept = [row for row in self.targets if row.target_agreement >= target and not row.refused]
        faster = [row for row in kept if row.speedup > NO_GAIN]
        return max(faster, key=lambda row: row.speedup, default=None)

    @property
    def recommended(self) -> Target | None:
        """The fastest setting from 99 % on, else the fastest of the others; None = full depth."""
        return self.fastest(NEAR) or self.fastest(0.0)


def save(report: Report, options: Options, path: Path, command: str = "") -> None:
    """Writes report.json: the report, the options, hardware and versions.

    Args:
      report: what was measured.
      options: what was asked for, under `config`.
      path: the file; replaced where it exists.
      command: that generates with the recommended setting.
    """
    by_target = {f"{target:g}": recommendation(report.fastest(target)) for target in options.targets}
    content = {
        **dataclasses.asdict(report),
        "refused": {row.name: row.refused for row in report.targets if row.refused},
        "recommended": {**recommendation(report.recommended), "command": command},
        "recommended_by_target": by_target,
        "config": dataclasses.asdict(options),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_text_whole(path, json.dumps(content, indent=2) + "\n")


def recommendation(row: Target | None) -> dict[str, Any]:
    """A setting as JSON values; None = full depth, so that it is never slower than full depth."""
    if row is None:
        full = {"target_agreement": 1.0, "speedup": 1.0, "predicted": 1.0, "agreement": 1.0}
        return {"dial": "full depth", **full, "generated_agreement": 1.0}
    return {
        "dial": row.dial,
        "target_agreement": row.target_agreement,
        "speedup": row.speedup,
        "predicted": row.predicted,
        "agreement": row.agreement,
        "generated_agreement": row.generated_agreement,
    }


def show_table(report: Report, targets: Sequence[float], console: Console) -> None:
    """Prints every setting with its agreement, mean layers, tokens/s and speed-up, and what is recommended.

    Args:
      report: what was measured.
      targets: agreements with the full model that were asked for.
      console: where the table goes.
    """
    title = "Agreement on given and on generated text, and speed by bytes and as measured"
    table = Table(box=rich.box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("setting", no_wrap=True)
    for heading in ("given", "generated", "layers", "tok/s", "bytes", "speed-up"):
        table.add_column(heading, justify="right")
    layers, rate = report.full_depth_layers, report.full_depth_tokens_per_s
    table.add_row("full depth", "100 %", "100 %", f"{layers}", f"{rate:.0f}", "1.00x", "1.00x")
    for row in report.targets:
        table.add_row(
            row.name,
            f"{100 * row.agreement:.2f} %",
            f"{100 * row.generated_agreement:.2f} %",
            f"{row.mean_layers:.2f}",
            f"{row.tokens_per_s:.0f}",
            f"{row.predicted:.2f}x",
            f"{row.speedup:.2f}x" + (f" ± {row.spread:.2f}" if row.spread else ""),
        )
    console.print(table)
    read = {"full depth": report.full_depth_gb_per_s, **{row.name: row.gb_per_s for row in report.targets}}
    known = ", ".join(f"{name} {rate:.1f}" for name, rate in read.items() if rate is not None)
    if known:
        console.print(f"GB/s of weights and caches that are read, at least: {known}")
    for row in report.targets:
        if row.refused:
            console.print(f"Not recommended: {row.name}: {row.refused}")

    best = report.recommended
    if best is None:
        console.print(
            "[bold]Recommended: full depth.[/] No setting that may be used was measured to be faster."
        )
        return
    console.print(f"[bold]Recommended: {best.name}[/], {best.speedup:.2f} times as fast as full depth")
    each = [(target, report.fastest(target)) for target in targets]
    chosen = [
        f"{100 * t:g} %: {f'{row.name}, {row.speedup:.2f}x' if row else 'full depth'}" for t, row in each
    ]
    console.print(f"By target: {'; '.join(chosen)}")


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
    parts = [(shown(part), depth) for part, depth in parts]
    text = shown(tokenizer.decode(prompt)) + render.to_ansi(parts, n_layers, colours, exits=depths)
    return f"{text}\n\n{render.to_ansi(render.legend(depths, n_layers), n_layers, colours)}"


def save_texts(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    samples: Mapping[str, Sequence[Sample]],
    report: Report,
    depths: Sequence[int],
    path: Path,
) -> None:
    """Writes an HTML page with every prompt continued in every way, coloured by depth.

    Args:
      tokenizer: of the model.
      prompts: token ids of each.
      samples: name of a setting -> one continuation per prompt.
      report: what was measured.
      depths: layers of every exit and of the full model, for the legend.
      path: the file; replaced where it exists.
    """
    n_layers = report.full_depth_layers
    speeds = {row.name: row for row in report.targets}
    blocks = [
        "<h1>Text by exit depth</h1>",
        f"<p>{html.escape(report.measured_on)}</p>" if report.measured_on else "",
        "<p>Plain text took all layers. A colour marks tokens that left earlier:</p>",
        render.to_html(render.legend(depths, n_layers), n_layers),
    ]
    for i, prompt in enumerate(prompts):
        blocks.append(f"<h2>Prompt {i + 1}</h2><pre>{html.escape(tokenizer.decode(prompt))}</pre>")
        for name, rows in samples.items():
            parts = sample_spans(tokenizer, prompt, rows[i])
            line = early_line(rows[i].exit_layers, n_layers, speeds.get(name))
            blocks.append(f"<h3>{html.escape(name)}</h3><p>{line}</p>")
            blocks.append(render.to_html(parts, n_layers, exits=depths))
    head = f'<!doctype html><meta charset="utf-8"><title>Text by exit depth</title>\n{STYLE}'
    write_text_whole(path, "\n".join([head, *blocks, ""]))


def early_line(exit_layers: Sequence[int], n_layers: int, row: Target | None) -> str:
    """How many tokens of one text left early, and how fast the setting was over all texts.

    Args:
      exit_layers: of every token of the text.
      n_layers: layers of the full model.
      row: what was measured of the setting; None = it is full depth.
    """
    tokens, early = len(exit_layers), sum(layers < n_layers for layers in exit_layers)
    share, mean = early / max(tokens, 1), sum(exit_layers) / max(tokens, 1)
    line = f"{early} of {tokens} tokens left early ({share:.0%}), mean {mean:.1f} of {n_layers} layers"
    if row is None:
        return line
    spread = f" ± {row.spread:.2f}" if row.spread else ""
    return f"{line}; all texts {row.speedup:.2f}{spread} times as fast as full depth"


def save_curve(report: Report, path: Path) -> None:
    """Draws speed-up over agreement, one point per target, with the spread of the rounds.

    Args:
      report: what was measured.
      path: the image; replaced where it exists.
    """
    curves: dict[str, list[SpeedPoint]] = {}
    for row in report.targets:
        label = f"target {100 * row.target_agreement:g} %\n{row.mean_layers:.1f} layers"
        point = SpeedPoint(row.agreement, row.speedup, label, row.spread)
        curves.setdefault(row.dial, []).append(point)
    quality_speed(curves, path, measured_on=report.measured_on)

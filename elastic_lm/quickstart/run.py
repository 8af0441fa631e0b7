"""The story, read top-down: load -> exits -> tune -> calibrate -> generate -> compare."""

import contextlib
import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rich.console import Console

from elastic_lm.checkpoints.embedded import embedded_model
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.config.data import DataConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.data import pipeline
from elastic_lm.data.batch import Batch
from elastic_lm.data.stdlib import Split
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.calibration import calibrate
from elastic_lm.depth.observations import Observations, observe
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.depth.threshold_search import exit_outcome
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.exits import without_exits
from elastic_lm.quickstart import folders, measure, report, text, train
from elastic_lm.quickstart.options import Options
from elastic_lm.report import colour as render

STEPS = 6
FULL = "full depth"


class Steps:
    """Says what is going on and remembers how long each step took."""

    def __init__(self, console: Console) -> None:
        self.console, self.seconds = console, dict[str, float]()
        self._began = time.monotonic()

    @contextlib.contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        """Announces a step, runs the block, reports its time."""
        self.console.print(f"[bold cyan]{len(self.seconds) + 1}/{STEPS}[/] {what}")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 2)
        self.console.print(f"    [dim]{self.seconds[name]:.1f} s[/]")

    def total(self) -> float:
        """Seconds since the first step was announced."""
        return time.monotonic() - self._began


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with tuned exits and what belongs to it."""

    decoder: Decoder
    params: Params
    tokenizer: Tokenizer
    name: str  # where it came from

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of every exit, then of the full model."""
        return (*(e.layer for e in self.decoder.config.exits), self.decoder.config.n_layers)


def run(options: Options, colour: str = "auto") -> report.Report:
    """Runs the main job and writes its results into `options.out`.

    Args:
      options: what to do; `Options().shrunk()` does it in moments.
      colour: "auto", "always" or "never", for the terminal.

    Returns:
      What was measured; the same numbers are in report.json.

    Raises:
      FileNotFoundError: model or data do not exist.
      ValueError: an option does not fit the model or the data.
    """
    console = Console(highlight=False)
    steps = Steps(console)
    out = Path(options.out)
    folders.check_files(out)
    out.mkdir(parents=True, exist_ok=True)
    for folder in ("model", folders.TUNING, *(("pretraining",) if options.from_scratch else ())):
        folders.check_replaceable(out / folder, Path(options.hf_dir) if options.hf_dir else None)
    with steps.step("load", f"Load {_source(options)}"):
        base = _base(options)
        train.check_exits(options, base)
        options = options.fitted(base.max_len)
        source, name = _load(options)
        prompts = text.held_out_prompts(
            _data(options, "test"), Tokenizer.load(source), options.prompts, options.prompt_tokens
        )
    with steps.step("tune", "Attach exits and tune them (the model itself stays frozen)"):
        model = _tune(options, source, name, base.n_layers)
    with steps.step("calibrate", "Calibrate thresholds on held-out text"):
        policy = _calibrate(options, model)
        policy.save(out / "thresholds.json")
    with steps.step("test", "Measure agreement on text that nothing was fitted on"):
        tested = _observe(options, model, "test", options.test_tokens, options.metric)
    with steps.step("generate", f"Generate: full depth and {len(options.targets)} targets take turns"):
        generations = _generate(options, model, policy, prompts)
    with steps.step("write", f"Write results to {out}"):
        rows = [_row(model, policy.at(t), tested, generations, prompts) for t in options.targets]
        result = _report(steps, model, rows, generations[FULL])
        _write(options, model, result, generations, prompts)
    _show(console, options, model, result, generations, prompts, colour)
    return result


def _base(options: Options) -> ModelConfig:
    """The model that exits are attached to, known before anything is trained."""
    if options.from_scratch:
        return train.small_model(options.tiny)
    return load_decoder(options.hf_dir or embedded_model())[0].config


def _source(options: Options) -> str:
    if options.from_scratch:
        return f"nothing: pretrain a small model for {options.pretrain_steps} steps"
    return f"the model in {options.hf_dir}" if options.hf_dir else "the embedded model"


def _data(options: Options, split: Split) -> DataConfig:
    folder = Path(options.out) / "text"
    sizes = {"seq_len": options.seq_len, "batch_size": options.batch_size}
    return text.data_config(split, options.data, folder, **sizes, seed=options.seed)


def _load(options: Options) -> tuple[Path, str]:
    """Folder of the model to start from, and its name."""
    if options.from_scratch:
        return train.pretrain(options, _data(options, "test")), "pretrained from scratch"
    if options.hf_dir:
        return Path(options.hf_dir), options.hf_dir
    return embedded_model(), "embedded"


def _tune(options: Options, source: Path, name: str, n_layers: int) -> Model:
    target = Path(options.out) / "model"
    decoder, params, saved = train.tune_exits(options, source, n_layers, _data(options, "test"))
    folders.renew(target, source)
    for part in saved.iterdir():
        shutil.move(part, target)
    return Model(decoder, params, Tokenizer.load(target), name)


def _batches(options: Options, model: Model, split: Split, tokens: int) -> Iterable[Batch]:
    data = _data(options, split)
    count = max(1, tokens // (data.seq_len * data.batch_size))
    batches = itertools.islice(pipeline.eval_batches(data, model.tokenizer, split), count)
    return (Batch(**arrays) for arrays in batches)


def _observe(options: Options, model: Model, split: Split, tokens: int, metric: str) -> Observations:
    batches = _batches(options, model, split, tokens)
    return observe(model.decoder.config, model.params, batches, metric=metric)


def _calibrate(options: Options, model: Model) -> ConfidenceExit:
    target = min(options.targets, key=lambda t: abs(t - 0.99))
    return calibrate(
        model.decoder.config,
        model.params,
        _batches(options, model, "calibration", options.calibration_tokens),
        target=target,
        metric=options.metric,
        targets=options.targets,
        model=model.name,
        data=f"calibration split of {' '.join(options.data) or 'the Python standard library'}",
        seed=options.seed,
    )


def _generate(
    options: Options, model: Model, policy: ConfidenceExit, prompts: list[list[int]]
) -> dict[str, measure.Generation]:
    """Continuations and speed of full depth, without any exit in the program, and of every target."""
    full, backbone = without_exits(model.decoder.config, model.params)
    samplers = {FULL: Sampler(Decoder(full), backbone, model.tokenizer)}
    for target in options.targets:
        samplers[str(target)] = Sampler(
            model.decoder, model.params, model.tokenizer, exit=policy.at(target), window=options.window
        )
    return measure.generate(samplers, prompts, options.new_tokens, options.rounds)


def _row(
    model: Model,
    policy: ConfidenceExit,
    tested: Observations,
    generations: Mapping[str, measure.Generation],
    prompts: list[list[int]],
) -> report.Target:
    """One line of the table."""
    assert policy.target is not None
    found = generations[str(policy.target)]
    held_out = exit_outcome(tested.confidence, tested.agrees, model.depths, policy.thresholds)
    return report.Target(
        target_agreement=policy.target,
        agreement=held_out.agreement,
        mean_layers=found.mean_layers,
        tokens_per_s=found.tokens_per_s,
        speedup=found.speedup(generations[FULL]),
        generated_agreement=measure.agreement(model.decoder.config, model.params, prompts, found.samples),
        thresholds=policy.thresholds,
    )


def _report(steps: Steps, model: Model, rows: list[report.Target], full: measure.Generation) -> report.Report:
    config = model.decoder.config
    description = {
        "name": model.name,
        "family": config.family,
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "exits": [dataclasses.asdict(e) for e in config.exits],
    }
    total = round(steps.total(), 2)
    return report.Report(total, config.n_layers, full.tokens_per_s, rows, steps.seconds, description)


def _write(
    options: Options,
    model: Model,
    result: report.Report,
    generations: Mapping[str, measure.Generation],
    prompts: list[list[int]],
) -> None:
    out = Path(options.out)
    report.save(result, options, out / "report.json")
    report.save_curve(result, out / "curve.png")
    texts = {t: generations[str(t)].samples for t in options.targets}
    n_layers = model.decoder.config.n_layers
    report.save_texts(model.tokenizer, prompts, texts, model.depths, n_layers, out / "text.html")


def _show(
    console: Console,
    options: Options,
    model: Model,
    result: report.Report,
    generations: Mapping[str, measure.Generation],
    prompts: list[list[int]],
    colour: str,
) -> None:
    """Text coloured by depth, the table, and what to do next."""
    target = min(options.targets, key=lambda t: abs(t - 0.99))
    sample = generations[str(target)].samples[0]
    console.print(f"\n[bold]A continuation at {100 * target:g} % agreement[/]\n")
    if colours := render.terminal_colours(sys.stdout, colour):
        shown = report.show_text(
            model.tokenizer, prompts[0], sample, model.depths, model.depths[-1], colours=colours
        )
        print(shown)
    else:
        print(model.tokenizer.decode(prompts[0]) + sample.text)
    console.print()
    report.show_table(result, console)
    out = options.out
    console.print(f"{out}/report.json, {out}/curve.png, {out}/text.html")
    console.print(f"[bold]{result.seconds_total:.0f} s in total.[/] Next:")
    command = f"elastic-lm generate --model {out}/model --thresholds {out}/thresholds.json"
    console.print(f'  {command} --prompt "def main():"', soft_wrap=True)

"""The story, read top-down: load -> exits -> tune -> calibrate -> generate -> compare."""

import contextlib
import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
from rich.console import Console

from elastic_lm.bench import plan as planning
from elastic_lm.bench.plan import Plan
from elastic_lm.checkpoints.embedded import embedded_model
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.config.data import DataConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.data import pipeline, splitting
from elastic_lm.data.batch import Batch
from elastic_lm.data.stdlib import Split
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.calibration import calibrate
from elastic_lm.depth.observations import Observations, observe
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.depth.preview_files import save_preview
from elastic_lm.depth.previewing import PreviewReport, measure_preview
from elastic_lm.depth.threshold_search import exit_outcome
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.exits import without_exits
from elastic_lm.nn.preview import HeadPreview
from elastic_lm.quickstart import folders, measure, report, train
from elastic_lm.quickstart.options import Options
from elastic_lm.report import colour as render

PLANNED_PROMPTS = 3  # that prompt lookup is tried on
PLANNED_TOKENS = 24_000  # most tokens of a pass of the plan
FULL = "full depth"


class Steps:
    """Says what is going on and remembers how long each step took."""

    def __init__(self, console: Console) -> None:
        self.console, self.seconds = console, dict[str, float]()
        self._began = time.monotonic()

    @contextlib.contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        """Announces a step, runs the block, reports its time."""
        self.console.print(f"[bold cyan]{len(self.seconds) + 1}[/] {what}")
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
    for folder in (folders.MODEL, folders.TUNING, *(("pretraining",) if options.from_scratch else ())):
        folders.check_replaceable(out / folder, Path(options.hf_dir) if options.hf_dir else None)
    with steps.step("load", f"Load {_source(options)}"):
        base = _base(options)
        train.check_exits(options, base)
        options = options.fitted(base.max_len)
        source, name = _load(options)
        prompts = splitting.held_out_prompts(
            _data(options, "test"), Tokenizer.load(source), options.prompts, options.prompt_tokens
        )
    folders.begin(out, Path(options.hf_dir) if options.hf_dir else None)

    plan = previews = None
    if options.hf_dir:
        with steps.step("plan", "Plan: measure what each dial would give on this model and device"):
            model = _load_plain(source, name)
            plan, previews, options = _plan(options, model, prompts, console)

    policy = None
    if plan is not None and not options.exits:
        layers = {row.exit_layer for row in plan.targets if row.best == "exits"}
        options = dataclasses.replace(options, exits=tuple(sorted(layers)))
    if plan is None or plan.exits_pay:
        with steps.step("tune", "Attach exits and tune them (the model itself stays frozen)"):
            model = _tune(options, source, name, base.n_layers)
        with steps.step("calibrate", "Calibrate thresholds on held-out text"):
            policy = _calibrate(options, model)

    with steps.step("test", "Measure agreement on text that nothing was fitted on"):
        settings = _settings(options, model, plan, previews or {}, policy)
    with steps.step("generate", f"Generate: full depth and {len(settings)} settings take turns"):
        generations = _generate(options, model, settings, prompts)
    with steps.step("write", f"Write results to {out}"):
        rows = [_row(model, setting, generations, prompts) for setting in settings]
        result = _report(steps, model, rows, generations[FULL], plan)
        _write(options, model, result, settings, generations, prompts)
        if policy is not None:
            _recommended(policy, result).save(out / "thresholds.json")
    _show(console, options, model, result, settings, generations, prompts, colour)
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
    return splitting.data_config(split, options.data, folder, **sizes, seed=options.seed)


def _load(options: Options) -> tuple[Path, str]:
    """Folder of the model to start from, and its name."""
    if options.from_scratch:
        return train.pretrain(options, _data(options, "test")), "pretrained from scratch"
    if options.hf_dir:
        return Path(options.hf_dir), options.hf_dir
    return embedded_model(), "embedded"


def _tune(options: Options, source: Path, name: str, n_layers: int) -> Model:
    target = Path(options.out) / folders.MODEL
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


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to decode: exits, or a preview of the vocabulary head, for a target agreement."""

    target: float
    agreement: float  # on text that nothing was fitted on
    policy: ConfidenceExit | None = None
    preview: HeadPreview | None = None

    @property
    def dial(self) -> str:
        """What makes it faster."""
        return "exits" if self.policy else "preview"


def _load_plain(source: Path, name: str) -> Model:
    decoder, params = load_decoder(source)
    return Model(decoder, params, Tokenizer.load(source), name)


def _plan(
    options: Options, model: Model, prompts: list[list[int]], console: Console
) -> tuple[Plan, dict[float, HeadPreview], Options]:
    """The plan, shown; previews; and options by which the rest takes the minutes that are left."""
    began = time.monotonic()
    budget = 60 * options.minutes
    tokens = _planned_tokens(options, model)
    plan, previews = planning.make_plan(
        model.decoder.config,
        model.params,
        options.targets,
        fitting=lambda: planning.first_tokens(_training(options, model), tokens),
        testing=lambda: planning.first_tokens(_batches(options, model, "calibration", tokens), tokens // 2),
        prompts=prompts[:PLANNED_PROMPTS],
        new_tokens=options.new_tokens // 4,
        window=options.window,
        say=lambda what: console.print(f"    [dim]{what}[/]"),
    )
    planning.show_plan(plan, console)

    # What is left is for timing, and for tuning where exits pay.
    left = max(budget - (time.monotonic() - began), budget / 4)
    timing = left * (0.45 if plan.exits_pay else 0.8)
    per_round = timing / options.rounds / (1 + len(options.targets)) / plan.seconds[0]
    new_tokens = int(min(options.new_tokens, max(16, per_round / min(options.prompts, 4))))
    count = int(min(options.prompts, max(2, per_round / new_tokens)))
    per_token = plan.seconds[-1] / len(plan.seconds)
    step = 4 * per_token * options.batch_size * options.seq_len
    held_out = int(max(2048, 0.1 * left / per_token))
    return (
        plan,
        previews,
        dataclasses.replace(
            options,
            new_tokens=new_tokens,
            prompts=count,
            steps=int(min(options.steps, max(2, 0.3 * left / step))),
            calibration_tokens=min(options.calibration_tokens, held_out),
            test_tokens=min(options.test_tokens, held_out),
        ),
    )


def _planned_tokens(options: Options, model: Model) -> int:
    """Tokens of a pass of the plan, so that its passes take a third of the minutes."""
    batch = next(iter(_batches(options, model, "calibration", 1)))
    decoder, params = model.decoder, model.params

    def forward() -> None:
        jax.block_until_ready(measure.full_choices(decoder.config.with_exits(()), params, batch.tokens[:1]))

    forward()
    began = time.monotonic()
    forward()
    per_token = (time.monotonic() - began) / batch.tokens.shape[1]
    return int(min(PLANNED_TOKENS, max(2048, 60 * options.minutes / 3 / per_token / 3)))


def _training(options: Options, model: Model) -> Iterable[Batch]:
    data = _data(options, "test")
    return (Batch(**arrays) for arrays in pipeline.train_batches(data, model.tokenizer))


def _settings(
    options: Options,
    model: Model,
    plan: Plan | None,
    previews: Mapping[float, HeadPreview],
    policy: ConfidenceExit | None,
) -> list[Setting]:
    """One setting per target that something pays for, with its agreement on the test text."""
    best = {row.target: row.best for row in plan.targets} if plan else {}
    tested = None
    if policy is not None:
        tested = _observe(options, model, "test", options.test_tokens, options.metric)

    settings = []
    for target in options.targets:
        if policy is not None and tested is not None and best.get(target, "exits") == "exits":
            found = policy.at(target)
            held_out = exit_outcome(tested.confidence, tested.agrees, model.depths, found.thresholds)
            settings.append(Setting(target, held_out.agreement, policy=found))
        elif best.get(target) == "preview":
            text = _batches(options, model, "test", options.test_tokens)
            report = measure_preview(model.decoder.config, model.params, text, previews[target])
            settings.append(Setting(target, report.agreement, preview=previews[target]))
    return settings


def _generate(
    options: Options, model: Model, settings: list[Setting], prompts: list[list[int]]
) -> dict[str, measure.Generation]:
    """Continuations and speed of full depth, without any exit in the program, and of every setting."""
    full, backbone = without_exits(model.decoder.config, model.params)
    samplers = {FULL: Sampler(Decoder(full), backbone, model.tokenizer)}
    for setting in settings:
        decoder, params = (model.decoder, model.params) if setting.policy else (Decoder(full), backbone)
        samplers[str(setting.target)] = Sampler(
            decoder,
            params,
            model.tokenizer,
            exit=setting.policy,
            preview=setting.preview,
            window=options.window,
        )
    return measure.generate(samplers, prompts[: options.prompts], options.new_tokens, options.rounds)


def _row(
    model: Model,
    setting: Setting,
    generations: Mapping[str, measure.Generation],
    prompts: list[list[int]],
) -> report.Target:
    """One line of the table."""
    found = generations[str(setting.target)]
    some = prompts[: len(found.samples)]
    return report.Target(
        target_agreement=setting.target,
        agreement=setting.agreement,
        mean_layers=found.mean_layers,
        tokens_per_s=found.tokens_per_s,
        speedup=found.speedup(generations[FULL]),
        generated_agreement=measure.agreement(model.decoder.config, model.params, some, found.samples),
        thresholds=setting.policy.thresholds if setting.policy else (),
        dial=setting.dial,
    )


def _report(
    steps: Steps, model: Model, rows: list[report.Target], full: measure.Generation, plan: Plan | None
) -> report.Report:
    config = model.decoder.config
    description = {
        "name": model.name,
        "family": config.family,
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "exits": [dataclasses.asdict(e) for e in config.exits],
    }
    total = round(steps.total(), 2)
    planned = planning.to_json(plan) if plan else None
    return report.Report(total, config.n_layers, full.tokens_per_s, rows, steps.seconds, description, planned)


def _write(
    options: Options,
    model: Model,
    result: report.Report,
    settings: list[Setting],
    generations: Mapping[str, measure.Generation],
    prompts: list[list[int]],
) -> None:
    out = Path(options.out)
    report.save(result, options, out / "report.json")
    if result.targets:
        report.save_curve(result, out / "curve.png")
    for setting in settings:
        if setting.preview is not None and result.plan is not None:
            found = PreviewReport(**result.plan["previews"][str(setting.target)])
            save_preview(setting.preview, found, out / _preview_file(setting.target))
    texts = {s.target: generations[str(s.target)].samples for s in settings}
    n_layers = model.decoder.config.n_layers
    some = prompts[: options.prompts]
    report.save_texts(model.tokenizer, some, texts, model.depths, n_layers, out / "text.html")


def _show(
    console: Console,
    options: Options,
    model: Model,
    result: report.Report,
    settings: list[Setting],
    generations: Mapping[str, measure.Generation],
    prompts: list[list[int]],
    colour: str,
) -> None:
    """Text coloured by depth, the table, and what to do next."""
    chosen = min(settings, key=lambda s: abs(s.target - 0.99), default=None)
    sample = generations[FULL if chosen is None else str(chosen.target)].samples[0]
    what = "full depth" if chosen is None else f"{100 * chosen.target:g} % agreement"
    console.print(f"\n[bold]A continuation at {what}[/]\n")
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
    curve = f", {out}/curve.png" if result.targets else ""
    console.print(f"{out}/report.json{curve}, {out}/text.html")
    console.print(f"[bold]{result.seconds_total:.0f} s in total.[/] Next:")
    console.print(f"  {_next_command(options, result)}", soft_wrap=True)


def _recommended(policy: ConfidenceExit, result: report.Report) -> ConfidenceExit:
    """The policy at the recommended target; as it was calibrated where exits are not recommended."""
    row = result.recommended
    return policy.at(row.target_agreement) if row is not None and row.dial == "exits" else policy


def _next_command(options: Options, result: report.Report) -> str:
    """The command that generates with the recommended setting."""
    out, row = options.out, result.recommended
    prompt = '--prompt "Once upon a time"' if options.hf_dir else '--prompt "def main():"'
    model = f"{out}/{folders.MODEL}"
    if row is None:
        how = f"--model {options.hf_dir or model}"
    elif row.dial == "preview":
        how = f"--model {options.hf_dir} --preview {out}/{_preview_file(row.target_agreement)}"
    else:
        how = f"--model {model} --thresholds {out}/thresholds.json"
    return f"elastic-lm generate {how} {prompt}"


def _preview_file(target: float) -> str:
    return f"{folders.PREVIEW}{100 * target:g}.safetensors"

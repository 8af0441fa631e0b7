"""The story, read top-down: load -> plan -> tune -> calibrate -> test -> generate -> compare."""

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

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
from elastic_lm.decode import generated
from elastic_lm.decode.generated import GeneratedText
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.calibration import calibrate
from elastic_lm.depth.fitting import FIT_TOKENS
from elastic_lm.depth.forecasting import NO_GAIN
from elastic_lm.depth.observations import Observations, observe
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.depth.preview_files import save_preview
from elastic_lm.depth.previewing import PreviewReport, measure_preview
from elastic_lm.depth.threshold_search import exit_outcome
from elastic_lm.files.local import local_path, require_folder_above
from elastic_lm.files.locks import LOCK_FILE, only_process
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.exits import without_exits
from elastic_lm.nn.preview import HeadPreview
from elastic_lm.quickstart import folders, measure, next_step, pace, report, train
from elastic_lm.quickstart.budget import Budget
from elastic_lm.quickstart.options import Options
from elastic_lm.quickstart.pace import Pace
from elastic_lm.quickstart.settings import Setting, exits_speedup, lookup_pays, preview_speedup
from elastic_lm.report import colour as render
from elastic_lm.report.machine import device_line
from elastic_lm.report.progress import Progress
from elastic_lm.report.terminal import shown

FULL = "full depth"


class Steps:
    """Says what is going on and remembers how long each step took; every step shows how far it is."""

    def __init__(self, console: Console, budget: Budget) -> None:
        self.console, self.budget = console, budget
        self.seconds = dict[str, float]()
        self.progress = Progress(console)
        self._what = ""

    @contextlib.contextmanager
    def step(self, name: str, what: str, live: bool = True) -> Iterator[None]:
        """Announces a step, runs the block, reports its time.

        Args:
          name: under which its seconds are remembered.
          what: is printed.
          live: a terminal shows a line that is redrawn; off where the block shows its own.
        """
        self.console.print(f"[bold cyan]{len(self.seconds) + 1}[/] {what}")
        began = time.monotonic()
        with Progress(self.console, live) as self.progress:
            yield
        self.seconds[name] = round(time.monotonic() - began, 2)
        self.console.print(f"    [dim]{self.seconds[name]:.1f} s[/]")

    def say(self, what: str) -> None:
        """Tells of a part of a step, whose batches are counted from now on."""
        self._what = what
        self.console.print(f"    [dim]{what}[/]")
        self.progress.update(what)

    def passing(
        self, batches: Iterable[Batch], count: int, share: float, least: int, what: str = ""
    ) -> Iterator[Batch]:
        """Batches of one pass, counted, as far as the time goes.

        Args:
          batches: any number.
          count: most of them.
          share: of the time that is left now.
          least: batches that come in any case.
          what: is shown; "" = what was said last.
        """
        some = self.budget.within(itertools.islice(batches, count), share, least)
        return self.progress.over(some, count, what or self._what)


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
    budget = Budget(options.minutes if options.hf_dir else math.inf)
    console = Console(highlight=False)
    out = local_path(options.out)
    require_folder_above(out / folders.MODEL)
    with only_process(out / LOCK_FILE, options.out, "choose another --out"):
        return _run(options, colour, Steps(console, budget), out)


def _run(options: Options, colour: str, steps: Steps, out: Path) -> report.Report:
    """`run` in a folder that no other process uses."""
    console, budget = steps.console, steps.budget
    folders.check_files(out)
    out.mkdir(parents=True, exist_ok=True)
    for folder in (folders.MODEL, folders.TUNING, *(("pretraining",) if options.from_scratch else ())):
        folders.check_replaceable(out / folder, Path(options.hf_dir) if options.hf_dir else None)
    with steps.step("load", f"Load {_source(options)}", live=not options.from_scratch):
        base = _base(options)
        train.check_exits(options, base)
        options = options.fitted(base.max_len)
        source, name = _load(options)
        prompts = splitting.held_out_prompts(
            _data(options, "test"), Tokenizer.load(source), options.prompts, options.prompt_tokens
        )
    folders.begin(out, Path(options.hf_dir) if options.hf_dir else None)

    plan = speed = policy = None
    previews: dict[float, HeadPreview] = {}
    fit_tokens = FIT_TOKENS
    if options.hf_dir:
        with steps.step("plan", "Plan: measure what each dial would give on this model and device"):
            model = _load_plain(source, name, options.dtype)
            plan, previews, speed, options = _plan(options, model, prompts, steps)
        if not options.exits:
            options = dataclasses.replace(options, exits=plan.paying_exits)

    tunes = plan is None or bool(plan.paying_exits)
    if plan and speed and tunes:
        sized = pace.for_tuning(
            options, speed, plan, exits=len(options.exits), vocab=base.vocab_size, left=budget.left()
        )
        options, fit_tokens = sized or (options, fit_tokens)
        tunes = sized is not None
        if not tunes:
            console.print("Exits should pay, but there is no time to tune them: give more --minutes")
    elif plan and any(row.best == "exits" for row in plan.targets):
        console.print("No exit is tuned: lossless lookup is forecast to gain more than twice as much")
    if tunes:
        with steps.step("tune", "Attach exits and tune them (the model itself stays frozen)", live=False):
            model = _tune(options, source, name, base, fit_tokens)
        if speed:
            options = pace.for_held_out(options, speed, budget.left())
        with steps.step("calibrate", "Calibrate thresholds on held-out text"):
            policy = _calibrate(options, model, steps)

    if speed:
        options = pace.for_held_out(options, speed, budget.left())
    with steps.step("test", "Measure agreement on text that nothing was fitted on"):
        settings = _settings(options, model, plan, previews, policy, steps)
    seconds = math.inf
    if speed:
        settings = pace.compared(settings, speed, budget.left())
        options, seconds = pace.for_timing(options, speed, 1 + len(settings), budget.left())
    with steps.step("generate", f"Generate: full depth and {len(settings)} settings take turns"):
        generations = _generate(options, model, settings, prompts, seconds, steps)
    with steps.step("compare", "Compare what was generated with the full model"):
        prompts = prompts[: len(generations[FULL].samples)]
        texts = _compare(model, settings, generations, prompts, steps)

    with steps.step("write", f"Write results to {out}"):
        rows = [_row(setting, generations, texts[setting.name]) for setting in settings]
        result = _report(options, steps, model, rows, generations[FULL], plan)
        typed = next_step.short_prompt([model.tokenizer.decode(prompt) for prompt in prompts])
        command = next_step.command(options, result.recommended, typed)
        _write(options, model, result, settings, generations, prompts, command)
        if policy is not None:
            _recommended(policy, result).save(out / "thresholds.json")
    _show(console, options, model, result, generations, prompts, colour, command)
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


def _tune(options: Options, source: Path, name: str, base: ModelConfig, fit_tokens: int) -> Model:
    target = Path(options.out) / folders.MODEL
    data = _data(options, "test")
    decoder, params, saved = train.tune_exits(options, source, base, data, fit_tokens)
    folders.move(saved, target, source)
    if options.dtype:
        decoder, params = load_decoder(target, dtype=options.dtype)
    return Model(decoder, params, _tokenizer(target, decoder), name)


def _batches(options: Options, model: Model, split: Split) -> Iterable[Batch]:
    batches = pipeline.eval_batches(_data(options, split), model.tokenizer, split)
    return (Batch(**arrays) for arrays in batches)


def _held_out(
    options: Options, model: Model, split: Split, tokens: int, steps: Steps, share: float = pace.HELD_OUT
) -> Iterable[Batch]:
    """So many held-out tokens, or as many as the share of the time that is left allows."""
    count = max(1, tokens // (options.seq_len * options.batch_size))
    least = -(-pace.LEAST_TOKENS // (options.seq_len * options.batch_size))
    return steps.passing(_batches(options, model, split), count, share, least, f"reading {split} text")


def _observe(options: Options, model: Model, steps: Steps) -> Observations:
    batches = _held_out(options, model, "test", options.test_tokens, steps)
    return observe(model.decoder.config, model.params, batches, metric=options.metric)


def _calibrate(options: Options, model: Model, steps: Steps) -> ConfidenceExit:
    target = min(options.targets, key=lambda t: abs(t - 0.99))
    return calibrate(
        model.decoder.config,
        model.params,
        _held_out(options, model, "calibration", options.calibration_tokens, steps),
        target=target,
        metric=options.metric,
        targets=options.targets,
        model=model.name,
        data=f"calibration split of {' '.join(options.data) or 'the Python standard library'}",
        tokenizer=model.tokenizer.fingerprint,
        seed=options.seed,
    )


def _load_plain(source: Path, name: str, dtype: str | None) -> Model:
    decoder, params = load_decoder(source, dtype=dtype)
    return Model(decoder, params, _tokenizer(source, decoder), name)


def _tokenizer(folder: Path | str, decoder: Decoder) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    tokenizer.check_vocabulary(decoder.config.vocab_size)
    return tokenizer


def _plan(
    options: Options, model: Model, prompts: list[list[int]], steps: Steps
) -> tuple[Plan, dict[float, HeadPreview], Pace, Options]:
    """The plan, shown; previews; how fast the model is; and options with the batches that suit it."""
    full, params = without_exits(model.decoder.config, model.params)
    steps.say("timing a pass over text, and generated tokens")
    speed = pace.measure_pace(Decoder(full), params, prompts[0], options.seq_len)
    options, tokens, count, new_tokens = pace.for_plan(options, speed, steps.budget.left())

    def some(batches: Iterable[Batch], tokens: int, least: int) -> Iterable[Batch]:
        most = max(least, tokens // (options.batch_size * options.seq_len))
        return steps.passing(batches, most, pace.PASS, least)

    found = planning.explore(
        model.decoder.config,
        model.params,
        options.targets,
        fitting=lambda: some(_training(options, model), tokens, pace.LEAST_BATCHES),
        # The heads of all candidates are read here, so that a token takes twice as long.
        testing=lambda: some(_batches(options, model, "calibration"), tokens // 2, pace.LEAST_BATCHES // 2),
        prompts=prompts[:count],
        new_tokens=new_tokens,
        window=options.window,
        rounds=pace.plan_rounds(speed, options.window, steps.budget.left()),
        say=steps.say,
    )
    planning.show_plan(found.plan, steps.console)
    return found.plan, found.previews, speed, options


def _training(options: Options, model: Model) -> Iterable[Batch]:
    batches = pipeline.train_batches(_data(options, "test"), model.tokenizer)
    return (Batch(**cast(Any, arrays)) for arrays in batches)


def _settings(
    options: Options,
    model: Model,
    plan: Plan | None,
    previews: Mapping[float, HeadPreview],
    policy: ConfidenceExit | None,
    steps: Steps,
) -> list[Setting]:
    """Lossless lookup, and one setting per target that something pays for, with its agreement on test text.

    Lookup gives full depth's tokens by construction; what it saves is known once text is generated.
    """
    settings = [Setting("lookup", target=1.0, agreement=1.0)] if lookup_pays(plan) else []
    planned = {row.target: row for row in plan.targets} if plan else {}
    config = model.decoder.config
    tested = _observe(options, model, steps) if policy is not None else None

    for target in options.targets:
        row = planned.get(target)
        if policy is not None and tested is not None and (row is None or row.best == "exits"):
            found = policy.at(target)
            outcome = exit_outcome(tested.confidence, tested.agrees, model.depths, found.thresholds)
            predicted = exits_speedup(config, found.thresholds, outcome, options.window, plan)
            settings.append(Setting("exits", target, outcome.agreement, predicted, policy=found))
        # Also where exits should pay, but there was no time to tune them.
        elif plan is not None and row is not None and (row.best == "preview" or row.preview > NO_GAIN):
            share = pace.HELD_OUT / len(options.targets)
            text = _held_out(options, model, "test", options.test_tokens, steps, share)
            kept = measure_preview(config, model.params, text, previews[target])
            predicted = preview_speedup(plan, kept.bytes)
            settings.append(Setting("preview", target, kept.agreement, predicted, preview=previews[target]))
    return settings


def _generate(
    options: Options,
    model: Model,
    settings: list[Setting],
    prompts: list[list[int]],
    seconds: float,
    steps: Steps,
) -> dict[str, measure.Generation]:
    """Continuations and speed of full depth, without any exit in the program, and of every setting."""
    full, backbone = without_exits(model.decoder.config, model.params)
    samplers = {FULL: Sampler(Decoder(full), backbone, model.tokenizer)}
    for setting in settings:
        decoder, params = (model.decoder, model.params) if setting.policy else (Decoder(full), backbone)
        how = setting.options(options.window)
        samplers[setting.name] = Sampler(decoder, params, model.tokenizer, options=how)
    return measure.generate(
        samplers,
        prompts[: options.prompts],
        options.new_tokens,
        options.rounds,
        seconds=seconds,
        tell=steps.progress.update,
    )


def _compare(
    model: Model,
    settings: list[Setting],
    generations: Mapping[str, measure.Generation],
    prompts: list[list[int]],
    steps: Steps,
) -> dict[str, GeneratedText]:
    """How the text of every setting compares with the full model."""
    config, full = model.decoder.config, generations[FULL].texts
    names = steps.progress.over([s.name for s in settings], len(settings), "reading what was generated")
    return {
        name: generated.compare(config, model.params, prompts, generations[name].texts, full)
        for name in names
    }


def _row(
    setting: Setting, generations: Mapping[str, measure.Generation], text: GeneratedText
) -> report.Target:
    """One line of the table."""
    found = generations[setting.name]
    return report.Target(
        target_agreement=setting.target,
        agreement=setting.agreement,
        mean_layers=found.mean_layers,
        tokens_per_s=found.tokens_per_s,
        speedup=found.speedup(generations[FULL]),
        generated_agreement=text.agreement,
        thresholds=setting.policy.thresholds if setting.policy else (),
        dial=setting.dial,
        # Every verification reads the weights once, however many tokens it gives.
        predicted=found.tokens_per_pass if setting.predicted is None else setting.predicted,
        repeats=text.repeats,
        degenerate="" if setting.dial == "lookup" else text.degenerate(setting.target),
        spread=found.spread(generations[FULL]),
        gb_per_s=found.gb_per_s,
    )


def _report(
    options: Options,
    steps: Steps,
    model: Model,
    rows: list[report.Target],
    full: measure.Generation,
    plan: Plan | None,
) -> report.Report:
    config = model.decoder.config
    description = {
        "name": model.name,
        "family": config.family,
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "exits": [dataclasses.asdict(e) for e in config.exits],
    }
    return report.Report(
        seconds_total=round(steps.budget.spent(), 2),
        full_depth_layers=config.n_layers,
        full_depth_tokens_per_s=full.tokens_per_s,
        full_depth_gb_per_s=full.gb_per_s,
        targets=rows,
        steps=steps.seconds,
        model=description,
        plan=planning.to_json(plan) if plan else None,
        timed={
            "prompts": len(full.samples),
            "new_tokens": options.new_tokens,
            "rounds": len(full.seconds),
        },
        measured_on=(
            f"{Path(model.name).name} ({config.n_layers} layers), batch 1, "
            f"{len(full.samples)} x {options.new_tokens} tokens, {len(full.seconds)} rounds, {device_line()}"
        ),
    )


def _write(
    options: Options,
    model: Model,
    result: report.Report,
    settings: list[Setting],
    generations: Mapping[str, measure.Generation],
    prompts: list[list[int]],
    command: str,
) -> None:
    out = Path(options.out)
    report.save(result, options, out / "report.json", command)
    if result.targets:
        report.save_curve(result, out / "curve.png")
    for setting in settings:
        if setting.preview is not None and result.plan is not None:
            found = PreviewReport(**result.plan["previews"][str(setting.target)])
            save_preview(setting.preview, found, next_step.preview_file(options.out, setting.target))
    texts = {s.name: generations[s.name].samples for s in settings}
    report.save_texts(model.tokenizer, prompts, texts, result, model.depths, out / "text.html")


def _show(
    console: Console,
    options: Options,
    model: Model,
    result: report.Report,
    generations: Mapping[str, measure.Generation],
    prompts: list[list[int]],
    colour: str,
    command: str,
) -> None:
    """Text coloured by depth, the table, and what to do next."""
    near = min(result.targets, key=lambda row: abs(row.target_agreement - 0.99), default=None)
    chosen = result.recommended or near
    name = FULL if chosen is None else chosen.name
    sample = generations[name].samples[0]
    console.print(f"\n[bold]A continuation with {name}[/]\n")
    if colours := render.terminal_colours(sys.stdout, colour):
        text = report.show_text(
            model.tokenizer, prompts[0], sample, model.depths, model.depths[-1], colours=colours
        )
        print(text)
    else:
        print(shown(model.tokenizer.decode(prompts[0]) + sample.text))
    console.print()
    report.show_table(result, options.targets, console)
    out = options.out
    curve = f", {out}/curve.png" if result.targets else ""
    console.print(f"{out}/report.json{curve}, {out}/text.html")
    if options.hf_dir and not options.data:
        console.print(
            "Measured on Python's standard library: name text like what the model is to write by --data."
        )
    console.print(f"[bold]{result.seconds_total:.0f} s in total.[/] Next:")
    console.print(f"  {command}", soft_wrap=True, markup=False)


def _recommended(policy: ConfidenceExit, result: report.Report) -> ConfidenceExit:
    """The policy at the recommended target; as it was calibrated where exits are not recommended."""
    row = result.recommended
    return policy.at(row.target_agreement) if row is not None and row.dial == "exits" else policy

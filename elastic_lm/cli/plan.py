"""`elastic-lm plan`: what each dial would give on a model and this device, before anything is tuned.

With --topology it plans a training run on devices that are not there (`bench.topology_plan`).
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from elastic_lm.cli.model_folder import load_with_tokenizer
from elastic_lm.cli.parser import (
    ModelOptions,
    add_data,
    add_model,
    listed,
    require_flag,
    require_share,
    shares,
)
from elastic_lm.cli.width_flags import budget_of
from elastic_lm.config.decoding import WINDOW
from elastic_lm.config.subnet import Budget

if TYPE_CHECKING:
    from elastic_lm.decode.setting_choice import Setting

HELP = """\
Forecasts what exits, previews and lookup would give on this device, or a training run on other devices.

elastic-lm plan --model my-model --data text.txt
elastic-lm plan --model my-model --data text.txt --dtype bfloat16 --batch-size 4 --json plan.json
elastic-lm plan --model my-model --data text.txt --budget latency_ms=70% --quality 0.98
elastic-lm plan --topology v5e:4x8 --config ee_tuning:8,16 --model llama-2-7b --config.mesh.fsdp=-1 \
  --config.mesh.data=1 --config.data.batch_size=32 --config.data.seq_len=2048 --config.train.remat=True
elastic-lm plan --topology h100:8 --config my_config.py --model my-model/config.json

Fits exits and previews in closed form, lets the model continue parts of the text, times the parts of an
iteration of the decode loop, and puts these together. Nothing is trained and the model is not changed. The
last line says what to use, or why nothing pays. With --budget or --quality, layers that draft are looked for
and the widths of an elastic model are measured, too, and one setting is chosen and explained.

With --topology, a training run is planned instead, from its config: does it fit, bytes of a device by kind,
FLOPs, collectives, a roofline time, and what every host reads and writes. Nothing is allocated, and no such
device is needed: for TPUs the step is compiled (pip install "elastic-lm[tpu-aot]"), for graphics cards it is
counted. Topologies are v5e:4x8, v5p:4x4x4, v5p-256, v6e-8, a100-80gb:8, h100:8, cpu:8 and the like; models a
folder, a config.json, or a published shape: smollm2-135m, tinyllama-1.1b, llama-2-7b, llama-2-13b,
llama-2-70b, llama-3-8b, llama-3-70b, bert-base.
"""

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 48, 64  # texts that are continued
SEQ_LEN = 256  # tokens per row that is fitted on
FEWEST, MOST = 2048, 24_000  # tokens that are fitted on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """What is planned for."""

    data: tuple[str, ...] = ()  # text files, folders or JSON lines; () = the Python standard library
    targets: tuple[float, ...] = (0.9, 0.95, 0.99)  # shares of tokens equal to the full model's
    minutes: float = 5.0  # about how long planning may take
    batch_size: int = 1  # rows that are decoded together
    window: int = WINDOW  # of `generate`
    budget: Budget | None = None  # milliseconds per token, for which a setting is chosen
    quality: str | None = None  # share of tokens equal to the whole model's, or like +0.05 nats of loss
    json: str | None = None  # file for the plan
    topology: str | None = None  # devices that a training run is planned for; None = this device is measured
    config: str | None = None  # that run: a recipe or a file, as of `train`
    overrides: tuple[str, ...] = ()  # --config.section.key=value each

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topology is not None:
            unread = "is not read with --topology, which plans a training run; leave it out"
            for name in ("data", "targets", "minutes", "batch_size", "window", "budget", "quality"):
                value = getattr(self, name)
                require_flag(value == getattr(Options, name), f"--{name.replace('_', '-')}", value, unread)
            require_flag(
                self.config is not None, "--topology", self.topology, "name the training run: --config RECIPE"
            )
        require_flag(
            self.config is None or self.topology is not None,
            "--config",
            self.config,
            "is the run that --topology plans: name the devices too, such as --topology v5e:4x8",
        )
        for target in self.targets:
            require_share("--targets", target)
            require_flag(
                target < 1, "--targets", target, "must be below 1: lossless decoding is planned anyway"
            )
        require_flag(self.minutes > 0, "--minutes", self.minutes, "must be above 0")
        require_flag(self.batch_size >= 1, "--batch-size", self.batch_size, "must be at least 1")
        require_flag(self.window >= 2, "--window", self.window, "must be at least 2")
        kind = self.budget.kind if self.budget else "latency_ms"
        require_flag(kind == "latency_ms", "--budget", kind, "settings are compared by latency_ms=N")
        _ = self.asked

    @property
    def asked(self) -> Budget | None:
        """The milliseconds and the quality as one budget; None = no setting is chosen.

        Raises:
          ValueError: the quality is no share and no added loss.
        """
        if self.quality is None:
            return self.budget
        quality: float | str = self.quality
        with contextlib.suppress(ValueError):
            quality = self.quality if self.quality.startswith("+") else float(self.quality)
        try:
            return dataclasses.replace(self.budget or Budget(quality=quality), quality=quality)
        except ValueError as error:
            raise ValueError(str(error).replace("budget.quality=", "--quality ", 1)) from None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add_model(parser)
    add_data(parser, "text like what will be written")
    add = parser.add_argument
    targets = f"agreements with the full model (default: {listed(Options.targets, ',')})"
    add("--targets", type=shares, metavar="A,..", help=targets)
    minutes = f"about how long it may take; less text is read for fewer (default: {Options.minutes:g})"
    add("--minutes", type=float, metavar="N", help=minutes)
    rows = f"prompts that are decoded together (default: {Options.batch_size})"
    add("--batch-size", type=int, metavar="B", help=rows)
    add("--window", type=int, metavar="W", help=f"of `generate` (default: {Options.window})")
    add("--budget", type=budget_of, metavar="latency_ms=N", help="per token, or a share of full depth's")
    quality = "share of tokens equal to the whole model's, or like +0.05 nats of loss; a setting is chosen"
    add("--quality", metavar="Q", help=quality)
    add("--json", metavar="FILE", help="write everything that was measured and forecast here")
    add("--topology", metavar="NAME", help="plan a training run on these devices, such as v5e:4x8 or h100:8")
    run_of = "that run, as `train` takes it; --config.section.key=value changes it"
    add("--config", metavar="RECIPE|FILE[:ARG]", help=run_of)
    parser.set_defaults(overrides=[])


def run(options: Options) -> None:
    """Plans, prints the forecasts, and writes them."""
    if options.topology is not None:
        run_on(options, options.topology)
    else:
        run_here(options)


def run_on(options: Options, name: str) -> None:
    """Plans a training run on devices that are not there."""
    import json
    import os
    import sys

    # Nothing runs here. Without this, jax would look for a TPU as soon as libtpu is installed.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from rich.console import Console

    from elastic_lm.bench.topology_plan import plan_training, show_plan, to_json
    from elastic_lm.checkpoints.describing import describe_model
    from elastic_lm.cost.topologies import parse_topology, simulate
    from elastic_lm.files.atomic import prepare_output, write_text_whole
    from elastic_lm.train.recipes import load_config

    prepare_output(options.json)
    topology = parse_topology(name)
    assert options.config is not None
    config = load_config(options.config, options.overrides)
    simulate(topology)

    place = options.model or config.train.init_from
    on_cpu = "float32" if topology.chip.platform == "cpu" else None
    model = describe_model(place, options.dtype or on_cpu) if place else None
    plan = plan_training(config, topology, model)
    show_plan(plan, Console(highlight=False))
    if options.json:
        write_text_whole(options.json, json.dumps(to_json(plan), indent=2) + "\n")
        print(f"written to {options.json}", file=sys.stderr)


def run_here(options: Options) -> None:
    """Measures a model on this device, prints the forecasts, and writes them."""
    import json
    import sys

    from rich.console import Console

    from elastic_lm.bench import plan as planning
    from elastic_lm.data.text_parts import LEAST_ROWS, batches, text_parts
    from elastic_lm.files.atomic import prepare_output, write_text_whole

    prepare_output(options.json)
    model, params, tokenizer, folder = load_with_tokenizer(options.model, options.dtype)
    config = model.config
    prompt_tokens = min(PROMPT_TOKENS, config.max_len // 6)
    new_tokens = min(NEW_TOKENS, config.max_len - 2 * prompt_tokens - planning.AGAIN)
    require_flag(
        prompt_tokens >= planning.AGAIN,
        "--model",
        options.model,
        f"max_len={config.max_len} is too short to plan",
    )

    # The text is read first, because too little of it is refused.
    parts = text_parts(
        options.data,
        tokenizer,
        seq_len=min(SEQ_LEN, config.max_len),
        fit_tokens=MOST,
        test_tokens=MOST // 2,
        prompts=max(PROMPTS, options.batch_size),
        prompt_tokens=prompt_tokens,
    )
    tokens = planning.affordable_tokens(config, params, options.minutes, fewest=FEWEST, most=MOST)
    rows = max(LEAST_ROWS, tokens // parts.fitting.shape[1])
    explored = planning.explore(
        config,
        params,
        options.targets,
        fitting=lambda: batches(parts.fitting[:rows]),
        testing=lambda: batches(parts.testing[: rows // 2]),
        prompts=parts.prompts,
        new_tokens=new_tokens,
        window=options.window,
        batch_size=options.batch_size,
        say=lambda what: print(what, file=sys.stderr, flush=True),
    )
    plan = explored.plan
    planning.show_plan(plan, Console(highlight=False))
    content = planning.to_json(plan)
    if options.asked is not None:
        from elastic_lm.bench.setting_list import all_settings
        from elastic_lm.checkpoints.native import load_menu
        from elastic_lm.cli.width_flags import is_elastic

        settings = all_settings(
            explored,
            config,
            params,
            parts.prompts,
            new_tokens,
            menu=load_menu(folder) if is_elastic(folder) else None,
            testing=lambda: batches(parts.testing[: rows // 2]),
            model=folder,
            data=options.data,
            say=lambda what: print(what, file=sys.stderr, flush=True),
        )
        content |= show_choice(settings, options.asked)
    if options.json:
        write_text_whole(options.json, json.dumps(content, indent=2) + "\n")
        print(f"written to {options.json}", file=sys.stderr)


def show_choice(settings: "Sequence[Setting]", budget: Budget) -> dict[str, object]:
    """Prints all settings and the one that is chosen, and how to run it; returns them as JSON values.

    Raises:
      ValueError: nothing meets the budget; the settings have been printed.
    """
    from elastic_lm.decode.setting_choice import choose

    for setting in sorted(settings, key=lambda one: one.latency_ms):
        print(f"    {setting}")
    choice = choose(settings, budget)
    print(choice.reason)
    if choice.setting.command:
        print(choice.setting.command)
    rows = [
        {
            "name": one.name,
            "latency_ms": one.latency_ms,
            "agreement": one.agreement,
            "added_loss": one.added_loss,
            "measured": one.measured,
        }
        for one in settings
    ]
    return {"settings": rows, "choice": choice.setting.name, "reason": choice.reason}

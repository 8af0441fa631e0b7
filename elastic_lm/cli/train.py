"""`elastic-lm train`: trains what a config file describes."""

import argparse
import dataclasses
from pathlib import Path

from elastic_lm.cli import signals
from elastic_lm.cli.parser import CommandOptions
from elastic_lm.files.recipes import recipe_folder, recipe_summaries


def recipe_lines() -> str:
    """The recipes of the package and what they train, one a line."""
    return "\n".join(f"  {name:<22} {summary}" for name, summary in recipe_summaries().items())


HELP = f"""\
Pretrains a model or tunes exits, as a config says; run it again to resume.

elastic-lm train --config ee_tuning --workdir runs/exits
elastic-lm train --config embedded:tiny --workdir runs/tiny --config.train.lr=3e-4
elastic-lm train --config my_config.py --workdir runs/mine

Recipes of the package, which lie in {recipe_folder()}:

{recipe_lines()}

Or give a Python file of yours. `--config name:argument` hands the argument to the file's get_config; every
key of the config can be overridden with --config.section.key=value. Unknown keys are refused with a
suggestion. The workdir holds checkpoints, metrics.jsonl and, at the end, model/. SIGTERM saves a checkpoint
and ends with status 0.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """What is trained, and where."""

    config: str  # a recipe or a Python file with get_config, and :ARGUMENT where it takes one
    workdir: str  # folder for checkpoints and metrics
    overrides: tuple[str, ...] = ()  # --config.section.key=value each


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`; `main` puts arguments that no flag takes into `overrides`."""
    config = "a recipe of the package, or a Python file with get_config"
    parser.add_argument("--config", required=True, metavar="RECIPE|FILE[:ARG]", help=config)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints and metrics go here")
    parser.set_defaults(overrides=[])


def run(options: Options) -> None:
    """Trains, or goes on with what the workdir holds."""
    from elastic_lm.checkpoints.native import QUICKSTART_MARK
    from elastic_lm.train import Stopped, fit, load_config

    workdir = options.workdir
    if (Path(workdir) / QUICKSTART_MARK).exists():
        raise ValueError(f"--workdir {workdir}: the next `elastic-lm quickstart` replaces it; choose another")

    config = load_config(options.config, list(options.overrides))
    try:
        model, _, metrics = fit(config, workdir, stop=signals.stop_on_sigterm())
    except Stopped as stopped:
        print(f"{workdir}: {stopped}")
        return

    numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    count = len(getattr(model, "exits", ()))
    exits = f", {count} exits" if count else ""
    print(f"{workdir}/model: {model.n_layers} layers{exits}; held out: {numbers or 'no text'}")

"""`elastic-lm train`: trains what a config file describes."""

import argparse
import dataclasses
from pathlib import Path

from elastic_lm.cli import signals
from elastic_lm.cli.parser import CommandOptions

HELP = """\
Pretrains a model or tunes exits, as a config says; run it again to resume.

elastic-lm train --config configs/ee_tuning.py --workdir runs/exits
elastic-lm train --config configs/embedded.py:tiny --workdir runs/tiny --config.train.lr=3e-4

`--config path:argument` hands the argument to the file's get_config; every key of the config can be
overridden with --config.section.key=value. Unknown keys are refused with a suggestion. The workdir
holds checkpoints, metrics.jsonl and, at the end, model/. SIGTERM saves a checkpoint and ends with status 0.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """What is trained, and where."""

    config: str  # a Python file with get_config, and :ARGUMENT where it takes one
    workdir: str  # folder for checkpoints and metrics
    overrides: tuple[str, ...] = ()  # --config.section.key=value each


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`; `main` puts arguments that no flag takes into `overrides`."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a file with get_config")
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

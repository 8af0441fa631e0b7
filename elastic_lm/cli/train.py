"""`elastic-lm train`: trains what a config file describes."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_lm.cli import signals
from elastic_lm.cli.many_processes import ProcessOptions, add_processes
from elastic_lm.cli.parser import require_flag
from elastic_lm.config.log import profiled_steps
from elastic_lm.files.recipes import recipe_folder, recipe_summaries

if TYPE_CHECKING:
    from elastic_lm.train import RunConfig, TaskRun
    from elastic_lm.train.record import Origin


def recipe_lines() -> str:
    """The recipes of the package and what they train, one a line."""
    return "\n".join(f"  {name:<22} {summary}" for name, summary in recipe_summaries().items())


HELP = f"""\
Pretrains a model or tunes exits, as a config says; run it again to resume.

elastic-lm train --config ee_tuning --workdir runs/exits
elastic-lm train --config embedded:tiny --workdir runs/tiny --config.train.lr=3e-4
elastic-lm train --config my_config.py --workdir runs/mine
elastic-lm train --gin_file ee_tuning --gin_param TrainConfig.lr=3e-4 --workdir runs/gin
elastic-lm train --config ee_tuning --sweep train.seed=0,1,2 --workdir runs/seeds

Recipes of the package, which lie in {recipe_folder()}:

{recipe_lines()}

Or give a Python file of yours. `--config name:argument` hands the argument to the file's get_config; every
key of the config can be overridden with --config.section.key=value, or with a blank for the equals sign;
--config.exits[0].layer=2 sets one entry of a list. Unknown keys are refused with a suggestion. The workdir
holds checkpoints, metrics.jsonl, run_config.json (as --config it repeats the run) and, at the end, model/.
SIGTERM saves a checkpoint and ends with status 0. --profile 10:13 traces these steps with JAX's profiler.

--sweep trains one run per value, each in a folder of the workdir, and ends with a table (sweep.json); several
make every combination. A run that fails does not stop the others; the status is 1 then.
"""
FAILED = 1  # exit status where a run of a sweep failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions):
    """What is trained, and where."""

    workdir: str  # folder for checkpoints and metrics
    # A recipe or a Python file with get_config, and :ARGUMENT where it takes one; or a run_config.json.
    config: str | None = None
    gin_file: tuple[str, ...] = ()  # gin files instead of a config
    gin_param: tuple[str, ...] = ()  # bindings that are read after them
    sweep: tuple[str, ...] = ()  # KEY=VALUE,VALUE each
    profile: str = ""  # steps that are traced: FIRST:LAST, or a count
    overrides: tuple[str, ...] = ()  # --config.section.key=value each

    def __post_init__(self) -> None:
        super().__post_init__()
        profiled_steps(self.profile, "--profile")
        gin = self.gin_file or self.gin_param
        if not gin and self.config is None:
            raise ValueError("nothing to train: give --config RECIPE or FILE, or --gin_file FILE")
        both = "and --config is given: a run has one or the other; leave one out"
        require_flag(self.config is None or not self.gin_file, "--gin_file", " ".join(self.gin_file), both)
        require_flag(self.config is None or not self.gin_param, "--gin_param", " ".join(self.gin_param), both)
        if gin and self.overrides:
            fix = "is not an override of a gin file: write --gin_param CLASS.NAME=VALUE"
            raise ValueError(f"{self.overrides[0]} {fix}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`; `main` puts arguments that no flag takes into `overrides`."""
    add = parser.add_argument
    text = "a recipe of the package, a file with get_config, or the run_config.json of a run"
    add("--config", metavar="RECIPE|FILE[:ARG]", help=text)
    text = "a gin file instead; repeat it for several, of which later ones win"
    add("--gin_file", action="append", metavar="FILE", help=text)
    text = "a gin binding like TrainConfig.lr=1e-3; may be repeated"
    add("--gin_param", action="append", metavar="BINDING", help=text)
    text = "train once per value, like train.seed=0,1,2; may be repeated"
    add("--sweep", action="append", metavar="KEY=V,V", help=text)
    text = "trace these steps into DIR/profile, like 10:13, or so many after the first, like 3"
    add("--profile", metavar="STEPS", help=text)
    add("--workdir", required=True, metavar="DIR", help="checkpoints and metrics go here")
    add_processes(parser)
    parser.set_defaults(overrides=[])


def run(options: Options) -> int | None:
    """Trains, or goes on with what the workdir holds."""
    import jax

    from elastic_lm.checkpoints.native import QUICKSTART_MARK
    from elastic_lm.processes import is_first
    from elastic_lm.train import Stopped, fit

    workdir = options.workdir
    if (Path(workdir) / QUICKSTART_MARK).exists():
        raise ValueError(f"--workdir {workdir}: the next `elastic-lm quickstart` replaces it; choose another")
    if options.sweep:
        several = jax.process_count()
        fix = f"runs as one process, and there are {several}: start it once, or start every run by itself"
        require_flag(several == 1, "--sweep", " ".join(options.sweep), fix)
        return sweep(options)

    config, origin = load(options)
    try:
        model, _, metrics = fit(config, workdir, stop=signals.stop_on_sigterm(), origin=origin)
    except Stopped as stopped:
        if is_first():
            print(f"{workdir}: {stopped}")
        return None

    if not is_first():
        return None
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    count = len(getattr(model, "exits", ()))
    exits = f", {count} exits" if count else ""
    print(f"{workdir}/model: {model.n_layers} layers{exits}; held out: {numbers or 'no text'}")
    return None


def load(options: Options, values: Mapping[str, str] | None = None) -> "tuple[RunConfig | TaskRun, Origin]":
    """The run that the flags describe, and where its config comes from.

    Args:
      options: of the command.
      values: of a sweep, by key: overrides, or bindings of gin.
    """
    from elastic_lm.train.gin_files import read_gin
    from elastic_lm.train.recipes import load_config, recipe_path
    from elastic_lm.train.record import Origin

    more = [f"{key}={value}" for key, value in (values or {}).items()]
    if options.config is None:
        config, operative = read_gin(options.gin_file, [*options.gin_param, *more])
        origin = Origin(options.gin_file, operative)
    else:
        config = load_config(options.config, [*options.overrides, *more])
        origin = Origin((str(recipe_path(options.config)[0]),))
    if options.profile:
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, profile=options.profile))
    return config, origin


def sweep(options: Options) -> int | None:
    """Trains one run per combination of values; returns a status that is not 0 where one failed."""
    from elastic_lm.train import Stopped
    from elastic_lm.train.sweeps import FILE, make_members, run_sweep, table, table_lines

    workdir = Path(options.workdir)
    members = make_members(options.sweep, lambda values: load(options, values))
    try:
        outcomes = run_sweep(
            members,
            workdir,
            stop=signals.stop_on_sigterm(),
            say=lambda text: print(text, flush=True),
        )
    except Stopped as stopped:
        print(f"{workdir}: {stopped}")
        return None

    print()
    print("\n".join(table_lines(table(members, outcomes))))
    failed = [name for name, outcome in outcomes.items() if outcome.error]
    what = f"; failed: {' '.join(failed)}" if failed else ""
    print(f"{workdir / FILE}: {len(outcomes) - len(failed)} of {len(members)} runs done{what}")
    return FAILED if failed else None

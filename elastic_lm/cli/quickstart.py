"""`elastic-lm quickstart`: the whole story on one small model, or on yours."""

import argparse
import dataclasses
from typing import Self, get_args

from elastic_lm.cli.parser import (
    DEFAULT_COLOUR,
    Colour,
    CommandOptions,
    add_colour,
    add_data,
    add_dtype,
    given_fields,
    layers,
    listed,
    local_place,
    metrics,
    require_colour,
    shares,
)
from elastic_lm.config.model import ExitKind
from elastic_lm.quickstart.options import Options as Job

HELP = """\
Plans what pays on a model, tunes and calibrates it, and measures it against full depth.

elastic-lm quickstart                              a few minutes on two CPU cores
elastic-lm quickstart --hf-dir my-model --data book.txt
elastic-lm quickstart --from-scratch               pretrains the small model first

Writes report.json, curve.png, text.html, the elastic checkpoint and thresholds files to --out.
Run again, it begins anew, also after a stop.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """What is run, and how its text is shown."""

    job: Job = dataclasses.field(default=Job())
    color: Colour = DEFAULT_COLOUR

    def __post_init__(self) -> None:
        require_colour(self.color)

    @classmethod
    def from_flags(cls, namespace: argparse.Namespace) -> Self:
        """The options of parsed flags; most flags are fields of the job, which --tiny shrinks."""
        fields = given_fields(Job, vars(namespace))
        tiny = fields.pop("tiny", False)
        job = Job(**fields)
        return cls(job=job.shrunk() if tiny else job, **given_fields(cls, vars(namespace)))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add = parser.add_argument
    add("--out", metavar="DIR", type=local_place, help=f"results go here (default: {Job.out})")
    text = "your own Hugging Face checkpoint instead of the embedded model"
    add("--hf-dir", metavar="DIR", type=local_place, help=text)
    add_data(parser, "your own text", local_place)
    add("--from-scratch", action="store_true", help="pretrain the small model instead of loading it")
    pretraining = f"with --from-scratch (default: {Job.pretrain_steps})"
    add("--pretrain-steps", type=int, metavar="N", help=pretraining)
    exits = "layers with an exit (default: one, after three quarters of them)"
    add("--exits", type=layers, metavar="L,L", help=exits)
    kinds = listed(get_args(ExitKind))
    add("--kind", help=f"exit kind: {kinds} (default: norm; with --hf-dir linear, fitted and tuned)")
    minutes = f"with --hf-dir: about how long the run may take (default: {Job.minutes:g})"
    add("--minutes", type=float, metavar="M", help=minutes)
    add("--steps", type=int, metavar="N", help=f"EE-tuning steps (default: {Job.steps})")
    targets = f"agreements with the full model (default: {listed(Job.targets, ',')})"
    add("--targets", type=shares, metavar="A,A", help=targets)
    add("--metric", help=f"confidence: {metrics(gates=False)} (default: {Job.metric})")
    add_dtype(parser, "of the model that is measured; exits are tuned in float32 (default: as saved)")
    add("--seed", type=int, help=f"of exits, shuffles and sampling (default: {Job.seed})")
    tiny = "under a minute: checks that everything works, numbers mean little"
    add("--tiny", action="store_true", help=tiny)
    add_colour(parser)


def run(options: Options) -> None:
    """Runs the quickstart."""
    from elastic_lm.quickstart.run import run as run_quickstart

    run_quickstart(options.job, colour=options.color)

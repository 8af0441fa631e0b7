"""`elastic-lm bench`: runs one benchmark."""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from elastic_lm.bench import report
from elastic_lm.cli.parser import CommandOptions, add_data, require_flag, require_seed

HELP = """\
Measures speed against what the hardware or a competitor allows.

elastic-lm bench decode --json decode.json
elastic-lm bench real --model my-model --data text.txt --json real.json

Sides of a comparison take turns in one process and medians are reported.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Which benchmark is run, and how."""

    name: str  # one of `bench.report.names()`
    json: str | None = None  # file for the result
    tiny: bool = report.Options.tiny  # a model that only checks that the benchmark runs
    rounds: int = report.Options.rounds  # timed rounds per side
    seed: int = report.Options.seed  # of weights and prompts
    model: str = report.Options.model  # a checkpoint of the user's own
    data: tuple[str, ...] = report.Options.data  # text of the user's own

    def __post_init__(self) -> None:
        require_flag(self.rounds >= 1, "--rounds", self.rounds, "must be at least 1")
        require_seed(self.seed)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add = parser.add_argument
    add("name", metavar="NAME", help=f"a benchmark: {', '.join(report.names())}")
    add("--json", metavar="FILE", help="write rows, hardware and versions here")
    add("--tiny", action="store_true", help="a model that only checks that the benchmark runs")
    add("--rounds", type=int, metavar="N", help=f"timed rounds per side (default: {Options.rounds})")
    add("--seed", type=int, help=f"of weights and prompts (default: {Options.seed})")
    add(
        "--model",
        metavar="DIR",
        help="decode: also draft with the exits of this checkpoint; real: measure it",
    )
    add_data(parser, "real: text to fit and measure on")


def run(options: Options) -> None:
    """Runs the benchmark; its rows are shown as they come, and kept where a later one fails."""
    from elastic_lm.files.atomic import can_be_replaced, new_beside, prepare_output

    prepare_output(options.json)
    # Not of pipes and devices, which have no place beside them.
    partial = new_beside(Path(options.json)) if options.json and can_be_replaced(options.json) else None

    def keep(result: dict[str, Any]) -> None:
        row = result["rows"][-1]
        print(f"{row['name']} {row['ratio']:.3f}", file=sys.stderr, flush=True)
        if partial:
            with contextlib.suppress(OSError):
                report.save(result, partial, links=False)  # it was not the user who chose its name

    how = report.Options(options.tiny, options.rounds, options.seed, options.model, options.data)
    try:
        result = report.run(options.name, how, keep)
    except BaseException:
        if partial and partial.is_file():
            print(f"the rows before are in {partial}, until {options.json} is written", file=sys.stderr)
        raise

    print(report.table(result))
    if options.json:
        report.save(result, options.json)
        if partial:
            partial.unlink(missing_ok=True)
        print(f"written to {options.json}", file=sys.stderr)

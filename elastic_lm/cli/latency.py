"""`elastic-lm latency`: builds the latency table of a model on this device, or checks one."""

import argparse
import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from elastic_lm.bench import report
from elastic_lm.cli.belonging import add_force, check_table, parts_of
from elastic_lm.cli.parser import CommandOptions, listed, require_flag, require_seed, shares
from elastic_lm.config.checks import require_choice
from elastic_lm.config.subnet import Menu
from elastic_lm.cost.counted import Workload

if TYPE_CHECKING:
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.cost.latency_table import LatencyTable
    from elastic_lm.models.decoder import Params

HELP = """\
Measures what every module and choice of a menu takes on this device, or checks such a table.

elastic-lm latency build --model ckpt --context 512 --out latency.json
elastic-lm latency verify --model ckpt --table latency.json --json verify.json
elastic-lm latency verify --json verify.json        builds a table first

The prefill and decoding programs of sub-networks take turns with the full model's; costs of modules are
fitted to their times. Without --model: a 12-layer Llama (d 768, vocabulary 32000) with random weights.
A checkpoint of an elastic model brings its menu; --mlp, --heads and --groups choose others.
verify times random sub-networks of the menu and prints predicted / measured.
"""

ACTIONS = ("build", "verify")
TABLE = "latency.json"  # file that `build` writes
CONTEXT = 128  # tokens of the prompt
SUBNETS = 20  # that `verify` times

BUILDS = ("out", "batch", "context", "mlp", "heads", "groups")  # options about a table that is built
VERIFIES = ("table", "subnets", "json")  # options of `verify` alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Which table is built or checked; None = not given, as some options exclude others."""

    action: str  # build or verify
    model: str | None = None  # folder; None = random weights
    table: str | None = None  # verify: file of the table; None = one is built first
    out: str | None = None  # file for the table that is built; None = TABLE for build, none for verify
    batch: int | None = None  # sequences decoded together; None = Workload.batch
    context: int | None = None  # None = CONTEXT
    mlp: tuple[float, ...] | None = None  # the menu's choices; None = the checkpoint's, or `default_menu`
    heads: tuple[float, ...] | None = None
    groups: tuple[float, ...] | None = None
    subnets: int | None = None  # None = SUBNETS
    rounds: int = report.Options.rounds  # timed rounds per program
    seed: int = report.Options.seed  # of prompts, random weights and sub-networks
    json: str | None = None  # verify: file for the result
    force: bool = False  # verify: a table of other weights is taken without a word
    tiny: bool = False  # a model that only checks that everything works

    def __post_init__(self) -> None:
        require_choice("action", self.action, ACTIONS)
        if self.action == "build":
            for name, value in self.given(VERIFIES).items():
                raise ValueError(f"--{name} {value}: goes with `latency verify`; leave it out")
        if self.table:
            for name, value in self.given(BUILDS).items():
                raise ValueError(
                    f"--{name} {value}: is settled by --table {self.table}; leave one of them out"
                )
        for name in ("subnets", "rounds"):
            number = getattr(self, name)
            require_flag(number is None or number >= 1, f"--{name}", number, "must be at least 1")
        require_seed(self.seed)
        if self.tiny and self.model:
            raise ValueError(f"--tiny: stands for a model of its own; leave it or --model {self.model} out")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add = parser.add_argument
    add("action", choices=ACTIONS, metavar="build|verify")
    add("--model", metavar="DIR", help="model folder or name (default: random weights)")
    add("--table", metavar="FILE", help="verify: from `latency build` (default: build one first)")
    add("--out", metavar="FILE", help=f"the table that is built goes here (build: default {TABLE})")
    add("--batch", type=int, metavar="N", help=f"sequences decoded together (default: {Workload.batch})")
    add("--context", type=int, metavar="N", help=f"tokens of the prompt (default: {CONTEXT})")
    mlp = f"shares of the neurons (default: {listed(Menu.mlp, ',')})"
    add("--mlp", type=shares, metavar="S,S", help=mlp)
    heads = f"shares of the heads in every key/value group (default: {listed(Menu.heads, ',')}; "
    add("--heads", type=shares, metavar="S,S", help=f"{heads}1 where halves are not whole)")
    groups = f"shares of the key/value groups (default: {listed(Menu.groups, ',')}; "
    add("--groups", type=shares, metavar="S,S", help=f"{groups}0.5,1 where heads cannot be halved)")
    add("--subnets", type=int, metavar="N", help=f"verify: random sub-networks (default: {SUBNETS})")
    add("--rounds", type=int, metavar="N", help=f"timed rounds per program (default: {Options.rounds})")
    seed = f"of prompts, random weights and sub-networks (default: {Options.seed})"
    add("--seed", type=int, help=seed)
    add("--json", metavar="FILE", help="verify: write rows, sub-networks, hardware and versions here")
    add_force(parser, "verify: a table")
    add("--tiny", action="store_true", help="a model that only checks that everything works")


def run(options: Options) -> None:
    """Builds the table, or loads or builds one and checks it."""
    from elastic_lm.cost.latency_table import LatencyTable
    from elastic_lm.files.atomic import prepare_output

    out = options.out or (TABLE if options.action == "build" else None)
    for path in (out, options.json):
        prepare_output(path)

    # A table that cannot be read is refused before a model is loaded.
    table = LatencyTable.load(options.table) if options.table else None
    config, params = timed_model(options)
    if table is not None and options.table:
        table.check(config, source=options.table)
        if options.model and params is not None:
            check_table(table, options.table, options.model, parts_of(params, None), options.force)
    else:
        table = built_table(options, config, params)
    if out:
        table.save(out)
        print(f"written to {out}", file=sys.stderr)

    if options.action == "build":
        print(table.text())
    else:
        verify(options, table, config, params)


def timed_model(options: Options) -> "tuple[ModelConfig, Params | None]":
    """The model that --model names, or one without parameters, which are then random."""
    from elastic_lm.bench.model import random_model
    from elastic_lm.checkpoints.loading import load_decoder

    if not options.model:
        return random_model(options.tiny), None
    model, params = load_decoder(options.model)
    return model.config, params


def built_table(options: Options, config: "ModelConfig", params: "Params | None") -> "LatencyTable":
    """The table of the workload and menu that the options describe."""
    from elastic_lm.bench.latency_build import build, default_menu
    from elastic_lm.checkpoints.native import load_menu
    from elastic_lm.report.writers import ProgressWriter

    menu = default_menu(config)
    if options.model:
        with contextlib.suppress(FileNotFoundError):
            menu = load_menu(options.model)
    menu = dataclasses.replace(menu, **options.given(("mlp", "heads", "groups")))

    workload = Workload(**{"context": CONTEXT, **options.given(("batch", "context"))})
    how: dict[str, Any] = {"rounds": options.rounds, "seed": options.seed, "progress": ProgressWriter}
    return build(config, menu, workload, params=params, path=options.model or "", **how)


def verify(options: Options, table: "LatencyTable", config: "ModelConfig", params: "Params | None") -> None:
    """Times sub-networks that the table never saw; prints and writes predicted against measured."""
    from elastic_lm.bench import latency_verify
    from elastic_lm.report import machine
    from elastic_lm.report.writers import ProgressWriter

    rows, checked = latency_verify.verify(
        table,
        config,
        params=params,
        count=SUBNETS if options.subnets is None else options.subnets,
        rounds=options.rounds,
        seed=options.seed,
        progress=ProgressWriter,
    )
    result = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "options": {name: getattr(options, name) for name in ("model", "table", "tiny", "rounds", "seed")},
        "workload": dataclasses.asdict(table.workload),
        "residuals": dict(table.residuals),
        "subnets": [dataclasses.asdict(c) for c in checked],
    }

    print(latency_verify.text(checked))
    print(report.table(result))
    if options.json:
        report.save(result, options.json)
        print(f"written to {options.json}", file=sys.stderr)

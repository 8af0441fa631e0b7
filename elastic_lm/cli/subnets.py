"""`elastic-lm subnets`: the named sub-networks of a model: listed, measured, added and removed."""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from elastic_lm.cli.held_out import HeldOutOptions, add_held_out, held_out_batches
from elastic_lm.cli.model_folder import writing_target
from elastic_lm.cli.parser import require_flag
from elastic_lm.cli.width_flags import WidthOptions, add_width, chosen_subnet, named_subnets

if TYPE_CHECKING:
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.config.subnet_table import NamedSubnet, SubnetTable
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.models.decoder import Params

HELP = """\
The named sub-networks of a model: layers, widths, parameters, measured loss and time.

elastic-lm subnets --model runs/elastic/model
elastic-lm subnets --model runs/elastic/model --measure --data held_out.txt
elastic-lm subnets --model runs/elastic/model --add small --subnet mlp=50% layers=0-7
elastic-lm subnets --model runs/elastic/model --add seventy --budget parameters=70%
elastic-lm subnets --model runs/elastic/model --add-table configs.csv
elastic-lm subnets --model runs/elastic/model --remove small

`generate`, `evaluate`, `calibrate` and `export` take the names: --subnet NAME. Training makes names that say
what is kept: d12-w50-h67 has 12 layers, half of the MLP neurons and two thirds of the heads. The table is in
the model's folder and goes with it, to a Hugging Face folder and to the Hub. Loss and time are measured, by
--measure, or "not measured"; what was measured on other weights is not shown.

--add-table reads the configurations of Gemma 3n's MatFormer (columns "name", "FFN Hidden Dims" and "Layers
Skipped"), for a model with as many layers, or the subnets.json of another folder.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(HeldOutOptions, WidthOptions):
    """What is done to the table of a model; nothing = it is shown."""

    measure: bool = False  # loss and time are measured and written
    names: tuple[str, ...] = ()  # with measure: of these alone; () = of all
    add: str | None = None  # name of the sub-network that --subnet or --budget names
    add_table: str | None = None  # file with further sub-networks
    remove: tuple[str, ...] = ()  # names that go
    json: str | None = None  # file for the table; - = stdout

    def __post_init__(self) -> None:
        HeldOutOptions.__post_init__(self)
        WidthOptions.__post_init__(self)
        named = self.subnet or self.budget
        if self.add is not None and not named:
            raise ValueError(
                f"--add {self.add}: say what it is: --subnet mlp=50%, or --budget parameters=70%"
            )
        if named and self.add is None:
            raise ValueError("--subnet and --budget say what --add NAME is; add that")
        fix = "is read with --measure; add that"
        require_flag(self.measure or not self.names, "--names", " ".join(self.names), fix)
        require_flag(self.measure or not self.data, "--data", " ".join(self.data), fix)
        if self.changes and not self.model:
            raise ValueError("--model: the embedded model is not changed; name a folder")

    @property
    def changes(self) -> bool:
        """Whether the table is written."""
        return bool(self.measure or self.add is not None or self.add_table or self.remove)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add_held_out(parser, "with --measure: held-out text")
    add = parser.add_argument
    add("--measure", action="store_true", help="measure loss and time per token, and write them down")
    add("--names", nargs="+", metavar="NAME", help="with --measure: of these alone, not of all")
    add("--add", metavar="NAME", help="name the part that --subnet or --budget says")
    table = "add the parts that a CSV of MatFormer configurations or another subnets.json lists"
    add("--add-table", metavar="FILE", help=table)
    add("--remove", nargs="+", metavar="NAME", help="take these names out")
    add_width(parser)
    add("--json", metavar="FILE", help="write the table here; - = to stdout")


def run(options: Options) -> None:
    """Changes the table as asked for, and shows it."""
    from elastic_lm.checkpoints.embedded import embedded_model
    from elastic_lm.files.atomic import prepare_output, write_text_whole
    from elastic_lm.files.remote import is_remote
    from elastic_lm.files.subnet_files import subnets_text

    if options.json and options.json != "-":
        prepare_output(options.json)
    folder = options.model or str(embedded_model())
    if not options.changes:
        table = shown_table(folder, options)
    else:
        from elastic_lm.files.local import local_path

        here = not is_remote(folder) and local_path(folder).is_dir()
        require_flag(here, "--model", folder, "the table is written into a folder; name one of this machine")
        with writing_target(folder):
            table = changed_table(folder, options)

    if options.json and options.json != "-":
        write_text_whole(options.json, subnets_text(table))
    print(subnets_text(table).rstrip() if options.json == "-" else table_text(table))


def shown_table(folder: str, options: Options) -> "SubnetTable":
    """The table of a model, without what was measured on other weights."""
    from elastic_lm.checkpoints.loading import load_decoder
    from elastic_lm.files.subnet_files import subnet_weights

    model, params = load_decoder(folder, dtype=options.dtype)
    table = named_subnets(folder, model.config)
    known = table.of_weights(subnet_weights(model.config, params))
    if table.weights and known is not table:
        print(f"note: {folder}: the weights changed since the sub-networks were measured", file=sys.stderr)
    return known


def changed_table(folder: str, options: Options) -> "SubnetTable":
    """The table after what the options ask for; it is written after every measurement."""
    from elastic_lm.cli.model_folder import load_with_tokenizer
    from elastic_lm.cost.named_subnets import named_subnet
    from elastic_lm.files.subnet_files import save_subnets, subnet_weights

    model, params, tokenizer, _ = load_with_tokenizer(folder, options.dtype)
    config = model.config
    table = named_subnets(folder, config).of_weights(subnet_weights(config, params))
    for name in options.remove:
        table = table.without(name)
    if options.add_table:
        table = table.adding(read_table(options.add_table, config))
    if options.add is not None:
        subnet = chosen_subnet(options, folder, config, params, tokenizer)
        assert subnet is not None
        table = table.adding([named_subnet(config, subnet, options.add)])
    for name in options.names:
        table.find(name)
    save_subnets(folder, table)

    if options.measure:
        table = measured_table(folder, config, params, tokenizer, table, options)
    return table


def measured_table(
    folder: str,
    config: "ModelConfig",
    params: "Params",
    tokenizer: "Tokenizer",
    table: "SubnetTable",
    options: Options,
) -> "SubnetTable":
    """Measures loss and time, and writes the table after each sub-network."""
    from pathlib import Path

    from elastic_lm.bench.measured_subnets import Timing, measure_subnets
    from elastic_lm.files.subnet_files import save_subnets

    batches, text = held_out_batches(options, tokenizer, "test")
    batches = list(batches)
    if options.data:  # the table goes with the model, and folders are this machine's
        files = " ".join(Path(path).name or "text" for path in options.data)
        text = f"{files}, up to {options.tokens} tokens"
    done: list[NamedSubnet] = []

    def note(one: "NamedSubnet") -> None:
        done.append(one)
        save_subnets(folder, table.replacing(done))
        print(f"{one.name}: {_loss(one)}, {_time(one)}", file=sys.stderr)

    how: dict[str, Any] = {"batches": batches, "text": text, "timing": Timing(), "told": note}
    measured = measure_subnets(config, params, table, names=options.names or None, **how)
    save_subnets(folder, measured)
    return measured


def read_table(file: str, config: "ModelConfig") -> "list[NamedSubnet]":
    """The sub-networks of another table that are parts of a model.

    Raises:
      ValueError: the file is no such table, or one of its sub-networks is no part of the model.
    """
    from elastic_lm.cost.named_subnets import named_subnet
    from elastic_lm.files.subnet_files import read_subnets
    from elastic_lm.width.slice_tables import read_slice_table

    if not file.endswith(".json"):
        return read_slice_table(file, config)
    try:
        return [named_subnet(config, one.subnet, one.name, one.origin) for one in read_subnets(file).subnets]
    except ValueError as error:
        raise ValueError(f"--add-table {file}: {error}") from None


def table_text(table: "SubnetTable") -> str:
    """The table, aligned for people."""
    rows: list[tuple[str, ...]] = [
        ("name", "layers", "neurons", "heads", "groups", "parameters", "loss", "time")
    ]
    whole = [sum(layer[i] for layer in table.sizes.layers) for i in range(3)]
    for one in table.subnets:
        subnet = one.subnet
        heads = sum(h * g for h, g in zip(subnet.heads, subnet.groups, strict=True))
        kept = (sum(subnet.mlp), heads, sum(subnet.groups))
        shares = (f"{n / of:.0%}" for n, of in zip(kept, whole, strict=True))
        layers = f"{len(subnet.layers)}/{len(table.sizes.layers)}"
        rows.append((one.name, layers, *shares, f"{one.parameters:,}", _loss(one), _time(one)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    lines = []
    for row in rows:
        first, *numbers = (
            cell.ljust(width) if i in (0, 6, 7) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *numbers)).rstrip())
    origins = [f"{one.name}: {one.origin}" for one in table.subnets if one.origin]
    return "\n".join([*lines, *origins])


def _loss(one: "NamedSubnet") -> str:
    return "not measured" if one.loss is None else f"{one.loss.nats_per_token:.4f} nats/token"


def _time(one: "NamedSubnet") -> str:
    if one.time is None:
        return "not measured"
    return f"{one.time.ms_per_token:.3g} ms/token ({one.time.speedup:.2f} times as fast)"

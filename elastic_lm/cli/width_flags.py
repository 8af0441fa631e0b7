"""The sub-network that commands run, measure or write: --subnet and --budget, and what they choose."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_lm.cli.belonging import check_table, parts_of
from elastic_lm.cli.parser import CommandOptions, listed
from elastic_lm.config.checks import require
from elastic_lm.config.drafter import Drafter
from elastic_lm.config.parse import from_dict
from elastic_lm.config.subnet import BUDGET_KINDS, Budget, Subnet
from elastic_lm.config.subnet_table import NAME
from elastic_lm.cost.counted import Workload

if TYPE_CHECKING:
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.config.subnet_table import SubnetTable
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.models.decoder import Params
    from elastic_lm.width.chooser import SubnetChooser

# What `Subnet.uniform` takes; `layers` are numbers, the others shares.
SHARES = ("mlp", "heads", "groups", "d_model", "depth")


@dataclasses.dataclass(frozen=True)
class SubnetText:
    """A sub-network as --subnet names it, before the model is known: shares by name, a name, or a file.

    Attributes:
      text: as it was typed.
      shares: of each of `SHARES` that was named.
      layers: the layers that are kept, counted from 0; None = `depth` says.
      file: JSON with the fields of `Subnet`, or with them under "subnet"; "" = there is none.
      name: in the model's table of sub-networks; "" = none is meant.
    """

    text: str
    shares: tuple[tuple[str, float], ...] = ()
    layers: tuple[int, ...] | None = None
    file: str = ""
    name: str = ""

    def of(self, config: "ModelConfig", folder: str) -> Subnet:
        """The sub-network of a model.

        Args:
          config: the whole model.
          folder: that it is in, or its name on the Hub.

        Raises:
          ValueError: it is none of this model, the file holds none, or the model has none of this name; names
            what does not fit, and names that are near.
        """
        try:
            if not self.file and not self.name:
                return Subnet.uniform(config, **dict(self.shares), layers=self.layers)
            if self.name:
                table = named_subnets(folder, config)
                if self.name in table or not Path(self.name).is_file():
                    return table.find(self.name).subnet
            subnet = _read_subnet(self.file or self.name)
            subnet.check(config)
        except ValueError as error:
            raise ValueError(f"--subnet {self.text}: {error}") from None
        return subnet


def named_subnets(folder: str, config: "ModelConfig") -> "SubnetTable":
    """The named sub-networks of a model; of one without a table none but the whole model."""
    from elastic_lm.config.subnet_table import WHOLE, ModelSizes, SubnetTable
    from elastic_lm.cost.named_subnets import named_subnet
    from elastic_lm.files.subnet_files import has_subnets, load_subnets

    if has_subnets(folder):
        return load_subnets(folder, config)
    return SubnetTable(ModelSizes.of(config), (named_subnet(config, Subnet.full(config), WHOLE),))


def _read_subnet(file: str) -> Subnet:
    """The sub-network that a file of JSON describes."""
    from elastic_lm.files.atomic import read_json
    from elastic_lm.files.remote import fetched

    found: Any = read_json(fetched(file))
    found = found.get("subnet", found) if isinstance(found, dict) else found
    require(isinstance(found, dict), file, type(found).__name__, "must hold the fields of el.Subnet")
    return from_dict(Subnet, found, "subnet.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WidthOptions(CommandOptions):
    """The part of a model that a command is about; the whole model where nothing is said."""

    subnet: SubnetText | None = None
    budget: Budget | None = None  # what that part may cost
    latency_table: str | None = None  # with a budget of milliseconds
    budget_context: int | None = None  # with a budget of FLOPs or bytes

    def __post_init__(self) -> None:
        """Refuses what does not go together."""
        budget, context = self.budget, self.budget_context
        kind = budget.kind if budget else None
        if self.subnet and budget:
            both = f"--subnet {self.subnet.text} and --budget {kind}={budget.given}"
            raise ValueError(f"{both}: each says what runs; give one of them")
        if context is not None and kind not in ("flops", "memory_bytes"):
            raise ValueError(
                f"--budget-context {context}: is read for --budget flops=N or memory_bytes=N; add one"
            )
        table = self.latency_table
        if table and kind != "latency_ms":
            raise ValueError(f"--latency-table {table}: is read for --budget latency_ms=N; add that")
        if budget and kind == "latency_ms" and not table:
            amount = budget.given if budget.share is not None else f"{budget.amount:g}"
            raise ValueError(
                f"--budget latency_ms={amount}: needs --latency-table FILE; write one: "
                "elastic-lm latency build --model DIR"
            )


def add_width(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds --subnet, --budget, --latency-table and --budget-context.

    Args:
      parser: of the command.
      several: --subnet and --budget may be given several times, and become tuples.
    """
    add, again = parser.add_argument, "; may be given several times" if several else ""
    shares = f"mlp=50%% heads=0.5 layers=0-7 ({', '.join(SHARES)})"
    what = f"a part of the model: a name that `subnets` lists, {shares}, or a JSON file{again}"
    add("--subnet", nargs="+", action=SubnetAction, const=several, metavar="NAME|KEY=SHARE", help=what)
    budget = f"what the part that runs may cost, or its share like 70%%: {listed(BUDGET_KINDS)}{again}"
    how: dict[str, Any] = {"action": "append"} if several else {}
    add("--budget", type=budget_of, metavar="KIND=N", help=budget, **how)
    add("--latency-table", metavar="FILE", help="with --budget latency_ms=N: from `latency build`")
    text = "with --budget flops=N or memory_bytes=N: positions before the decoded token "
    add("--budget-context", type=int, metavar="N", help=f"{text}(default: {Workload.context})")


class SubnetAction(argparse.Action):
    """The words after --subnet as a `SubnetText`, or as one more of a list where `const` is true."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Keeps the sub-network that the words name."""
        try:
            found: Any = subnet_of(values)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        earlier = getattr(namespace, self.dest, [])
        setattr(namespace, self.dest, [*earlier, found] if self.const else found)


def subnet_of(words: list[str]) -> SubnetText:
    """What the words after --subnet say.

    Raises:
      ValueError: they name no share of a part, nor layers, nor one name or file.
    """
    text = " ".join(words)
    if len(words) == 1 and "=" not in words[0]:
        named = NAME.fullmatch(words[0]) and not words[0].endswith(".json")
        return SubnetText(text, name=words[0]) if named else SubnetText(text, file=words[0])

    shares: dict[str, float] = {}
    layers: tuple[int, ...] | None = None
    for word in words:
        key, _, value = word.partition("=")
        if key == "layers":
            layers = _layers(word, value)
        elif key in SHARES:
            shares[key] = _share(word, value)
        else:
            raise ValueError(f"{word!r} is not KEY=SHARE, KEY one of {', '.join(SHARES)}, or layers=0-7")
    return SubnetText(text, tuple(shares.items()), layers)


def _share(word: str, value: str) -> float:
    """A share written as 0.5 or 50%."""
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{value!r} in {word!r} is not a share like 0.5 or 50%") from None
    if not 0 < share <= 1:
        raise ValueError(f"{value!r} in {word!r} must be above 0 and at most 1 (100%)")
    return share


def _layers(word: str, value: str) -> tuple[int, ...]:
    """Layers written as 0-3,6,8-11."""
    found: list[int] = []
    for part in value.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)):
            raise ValueError(f"{value!r} in {word!r} is no list of layers like 0-3,6")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def budget_of(text: str) -> Budget:
    """A budget written as KIND=AMOUNT or KIND=SHARE%, as a flag's type."""
    kind, _, amount = text.partition("=")
    if kind not in BUDGET_KINDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=AMOUNT, KIND one of {listed(BUDGET_KINDS)}")
    try:
        number = amount if "%" in amount else float(amount)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{amount!r} in {text!r} is not a number") from None
    try:
        return Budget(**{kind: number})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def chooser(
    folder: str,
    config: "ModelConfig",
    budget: Budget,
    *,
    latency_table: str | None = None,
    context: int | None = None,
    parts: Mapping[str, str] | None = None,
    force: bool = False,
) -> "SubnetChooser":
    """The choices of a checkpoint, with a latency table or a context.

    Args:
      folder: of the model.
      config: the model.
      budget: what it may cost.
      latency_table: file of measured milliseconds.
      context: at which FLOPs and bytes are counted.
      parts: fingerprints of the model, which a latency table is compared with; None = it is not.
      force: a latency table of other weights is taken without a word.

    Raises:
      ValueError: a context is named, and the checkpoint's routers were trained for another one.
    """
    from elastic_lm.cost.latency_table import LatencyTable
    from elastic_lm.width.chooser import SubnetChooser

    found = SubnetChooser.load(folder, config)
    if latency_table:
        table = LatencyTable.load(latency_table)
        with_table = found.with_latency(table, latency_table)
        check_table(table, latency_table, folder, parts or {}, force)
        return with_table
    if context is None:
        return found
    by_routers = found.routers is not None and found.routers.table.kind == budget.kind
    require(
        not by_routers,
        "--budget-context",
        context,
        "the routers of this model keep to the context that they were trained for; leave it out",
    )
    return dataclasses.replace(found, workload=Workload(context=context))


def chosen_subnet(
    options: WidthOptions,
    folder: str,
    config: "ModelConfig",
    params: "Params",
    tokenizer: "Tokenizer | None",
    *,
    force: bool = False,
) -> Subnet | None:
    """The sub-network that the options choose, told on stderr; None = the whole model.

    Args:
      options: of the command.
      folder: of the model.
      config: the whole model.
      params: its parameters, which a latency table is compared with.
      tokenizer: of the model.
      force: a latency table of other weights is taken without a word.

    Raises:
      ValueError: the sub-network is none of this model, or the budget cannot be met.
      FileNotFoundError: the model has no menu for a budget.
    """
    if options.subnet:
        subnet = options.subnet.of(config, folder)
        if not options.subnet.name and not is_elastic(folder):
            what = "was not made elastic, so that its first neurons and heads stay, whatever they do"
            print(f"note: {folder} {what}", file=sys.stderr)
    elif options.budget:
        parts = parts_of(params, tokenizer) if options.latency_table else None
        menu = chooser(
            folder,
            config,
            options.budget,
            latency_table=options.latency_table,
            context=options.budget_context,
            parts=parts,
            force=force,
        )
        subnet = menu.subnet(options.budget)
    else:
        return None
    print(subnet_line(config, subnet), file=sys.stderr)
    return subnet


def chosen_drafter(drafter: SubnetText, config: "ModelConfig", folder: str) -> Drafter:
    """What drafts for a model, told on stderr.

    Args:
      drafter: what the flag says: shares, layers, a name in the model's table, or a file.
      config: of the model.
      folder: that the model is in, or its name on the Hub.

    Raises:
      ValueError: it is none of this model, or the file holds none.
    """
    from elastic_lm.files.atomic import read_json
    from elastic_lm.width.drafter_files import load_drafter

    try:
        file = drafter.file or (drafter.name if Path(drafter.name).is_file() else "")
        content: Any = read_json(Path(file)) if file else None
        if isinstance(content, dict) and "drafter" in content:
            found = load_drafter(file)
        else:
            found = Drafter(drafter.of(config, folder))
        found.check(config)
    except ValueError as error:
        raise ValueError(str(error).replace("--subnet", "--drafter", 1)) from None
    print(subnet_line(config, found.subnet).replace("runs", "drafts by", 1), file=sys.stderr)
    return found


def is_elastic(folder: str) -> bool:
    """Whether a model, in a folder or on the Hub, has a menu of widths."""
    from elastic_lm.checkpoints.native import MENU_FILE
    from elastic_lm.files.hub import local_model

    return (local_model(folder, weights=False) / MENU_FILE).is_file()


def subnet_line(config: "ModelConfig", subnet: Subnet) -> str:
    """How much of a model a sub-network is, in one line."""

    def sizes(of: Subnet) -> tuple[int, int, int]:
        heads = sum(h * g for h, g in zip(of.heads, of.groups, strict=True))
        return len(of.layers), sum(of.mlp), heads

    units = ("layers", "neurons", "heads")
    pairs: list[tuple[int, int, str]] = [*zip(sizes(subnet), sizes(Subnet.full(config)), units, strict=True)]
    if subnet.d_model != config.d_model:
        pairs.append((subnet.d_model, config.d_model, "channels"))
    return "runs " + ", ".join(f"{kept} of {whole} {unit}" for kept, whole, unit in pairs)


def check_same_part(
    file: str,
    recorded: Mapping[str, Any],
    subnet: Subnet | None,
    config: "ModelConfig",
    *,
    promise: bool,
    force: bool,
) -> None:
    """Says where thresholds were calibrated on another part of the model than the one that runs.

    Args:
      file: of the thresholds.
      recorded: what it says about its model.
      subnet: what runs; None = the whole model.
      config: the whole model.
      promise: a guarantee would be broken, so that it is refused; else a warning on stderr will do.
      force: the user knows; nothing is said.

    Raises:
      ValueError: the part is another one, and a guarantee would be broken.
    """
    written = recorded.get("subnet")
    theirs = from_dict(Subnet, written, "subnet.") if isinstance(written, Mapping) else Subnet.full(config)
    if force or not recorded or theirs == (subnet or Subnet.full(config)):
        return
    of = "a sub-network" if theirs != Subnet.full(config) else "the whole model"
    fix = "calibrate again with the same --budget or --subnet"
    line = f"{file}: was calibrated on {of}, not on what runs; {fix}"
    if promise:
        raise ValueError(f"{line}, or pass --force: its guarantee is about that part alone")
    print(f"warning: {line}, or pass --force", file=sys.stderr)

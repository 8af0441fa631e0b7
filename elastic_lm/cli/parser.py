"""What the commands share: the parser, the base class of their options, types of values, and some flags."""

import argparse
import dataclasses
import difflib
import functools
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, Self, get_args

from elastic_lm.config.checks import SEED, require, require_choice
from elastic_lm.config.exit_policy import GATE_METRIC, METRICS
from elastic_lm.config.model import DTYPES
from elastic_lm.files.local import local_path
from elastic_lm.files.recipes import split_argument
from elastic_lm.files.remote import address_of, is_remote

Colour = Literal["auto", "always", "never"]
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-inf(inity)?$|-nan$", re.IGNORECASE)
DEFAULT_COLOUR: Colour = "auto"  # where stdout is a terminal


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and suggest the closest option."""

    def __init__(self, **kwargs: Any) -> None:
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=110)
        # A flag that was not typed leaves nothing in the namespace, so that the defaults of the command's
        # `Options` are the only ones.
        missing = argparse.SUPPRESS
        super().__init__(formatter_class=layout, allow_abbrev=False, argument_default=missing, **kwargs)
        # Without it, -1e-3 counts as a flag.
        self._negative_number_matcher = NEGATIVE_NUMBER

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        """Adds an argument; one for a file or folder takes paths on this machine alone."""
        if kwargs.get("metavar") in PLACES:
            kwargs.setdefault("type", PLACES[kwargs["metavar"]])
        return super().add_argument(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Reports arguments that no option takes, with the closest known option."""
        near = difflib.get_close_matches(unknown[0].partition("=")[0], self._options(), n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        self.error(f"unknown argument {unknown[0]}{hint}")

    def _options(self) -> list[str]:
        """Names of all options, including those of sub-commands."""
        names = [name for action in self._actions for name in action.option_strings]
        choices = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return names + [name for each in choices for parser in each.values() for name in parser._options()]


class Version(argparse.Action):
    """Prints the version of the package and of what it runs on, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import elastic_lm
        from elastic_lm.report.machine import versions

        others = ", ".join(f"{name} {v}" for name, v in versions().items() if name != "elastic-lm")
        print(f"elastic-lm {elastic_lm.__version__} ({others})")
        parser.exit()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What a command is asked to do; every command has a subclass whose fields are named as its flags."""

    @classmethod
    def from_flags(cls, namespace: argparse.Namespace) -> Self:
        """The options of parsed flags; what was not typed keeps the default of its field.

        Raises:
          ValueError: a value is refused; names the flag, the value and the fix.
        """
        return cls(**given_fields(cls, vars(namespace)))

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """The values of these fields, without those that are None, which stands for "not given"."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(CommandOptions):
    """The model that a command reads."""

    model: str | None = None  # folder; None = the embedded model
    dtype: str | None = None  # of parameters and activations; None = as saved

    def __post_init__(self) -> None:
        require_dtype(self.dtype)


def given_fields(cls: type, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass among the flags that were typed, with tuples in place of lists."""
    values = {f.name: typed[f.name] for f in dataclasses.fields(cls) if f.name in typed}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def require_flag(ok: bool, flag: str, value: object, fix: str) -> None:
    """Raises ValueError "--flag value: fix" unless `ok`, with the value as it is typed."""
    if not ok:
        raise ValueError(f"{flag} {value}: {fix}")


def require_share(flag: str, value: float | None) -> None:
    """`require_flag` for a number in (0, 1]; None = the flag was not given."""
    require_flag(value is None or 0 < value <= 1, flag, value, "must be a share above 0 and at most 1")


def require_seed(value: int) -> None:
    """`require` for the value of --seed."""
    require_flag(SEED[0](value), "--seed", value, SEED[1])


def require_colour(value: str) -> None:
    """`require` for the value of --color."""
    require_choice("--color", value, get_args(Colour))


def require_dtype(value: str | None) -> None:
    """`require` for the value of --dtype; None = the flag was not given."""
    require(value is None or value in DTYPES, "--dtype", value, f"must be one of {listed(DTYPES)}")


def place(text: str) -> str:
    """A file or folder, on this machine or in a store that is supported, as a flag's type."""
    try:
        address_of(text) if is_remote(text) else local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def local_place(text: str) -> str:
    """A file or folder on this machine, as a flag's type."""
    try:
        local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def service_or_place(text: str) -> str:
    """`place`, the address of a service behind HTTP, or a file after the name of what reads it."""
    service = text.startswith(("http://", "https://"))
    return text if service or (text and "://" not in text) else place(text)


def config_place(text: str) -> str:
    """A recipe or a Python file, with an argument of any kind behind it, as a flag's type."""
    place(split_argument(text)[0])
    return text


# Types of files and folders by their metavars.
PLACES: Mapping[str, Callable[[str], str]] = {
    "FILE": place,
    "DIR": place,
    "HF_DIR": place,
    "RECIPE|FILE[:ARG]": config_place,
    "DIR|URL|NAME:FILE": service_or_place,
}


def share(text: str) -> float:
    """A share such as 0.99, as a flag's type."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share like 0.99") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def shares(text: str) -> tuple[float, ...]:
    """Shares with commas between them, as a flag's type."""
    return tuple(share(part) for part in text.split(","))


def layers(text: str) -> tuple[int, ...]:
    """Layers with commas between them, as a flag's type."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers like 3,6,9") from None


def listed(values: Iterable[object], between: str = ", ") -> str:
    """Values as help texts show them, like "0.25,0.5,1" or "rows, openai"."""
    return between.join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def metrics(gates: bool) -> str:
    """The confidence metrics for a help text.

    Args:
      gates: the command can use exits with gates, which one of the metrics reads.
    """
    gateless = [name for name in METRICS if name != GATE_METRIC]
    return listed([*gateless, f"{GATE_METRIC} (exits with gates)"] if gates else gateless)


def add_command(choices: "argparse._SubParsersAction[Parser]", name: str, module: types.ModuleType) -> Parser:
    """Adds the parser of a command, with the flags that every command has.

    Args:
      choices: the commands of the parser above.
      name: as it is typed.
      module: has `HELP`, whose first line is the summary, `add_flags`, `Options` and `run`.
    """
    parser = choices.add_parser(name, help=module.HELP.splitlines()[0], description=module.HELP)
    parser.set_defaults(module=module)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.add_flags(parser)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ModelOptions`."""
    text = "folder, .gguf file, or ORG/NAME[@REVISION] on the Hub (default: the embedded model)"
    parser.add_argument("--model", metavar="DIR", help=text)
    add_dtype(
        parser, "of parameters and activations (default: as saved; of a Hugging Face folder float32 on CPU)"
    )


def add_data(parser: argparse.ArgumentParser, purpose: str, kind: Callable[[str], str] = place) -> None:
    """Adds --data.

    Args:
      parser: of the command.
      purpose: what the command uses the text for.
      kind: of paths that the command takes.
    """
    text = f"{purpose}: text files, folders or .jsonl with a `text` field (default: Python's own library)"
    parser.add_argument("--data", nargs="+", metavar="FILE", type=kind, help=text)


def add_dtype(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --dtype with its help text."""
    parser.add_argument("--dtype", choices=DTYPES, help=text)


def add_colour(parser: argparse.ArgumentParser) -> None:
    """Adds --color."""
    text = f"text coloured by exit depth (default: {DEFAULT_COLOUR})"
    parser.add_argument("--color", choices=get_args(Colour), help=text)

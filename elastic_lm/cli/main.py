"""The `elastic-lm` command: flags in, one function of `elastic_lm.commands` called, errors in one line.

Nothing heavy is imported until a command runs, so `--help` is instant.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from elastic_lm.cli.parser import build_parsers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments after the program's name; None = those of the process.

    Returns:
      0 on success, 2 when the input was refused, 130 when interrupted.
    """
    parser, commands = build_parsers()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "train":
        arguments.overrides = rest
    elif rest:
        commands[arguments.command].refuse(rest)
    return guard(f"elastic-lm {arguments.command}", arguments.debug, lambda: call(arguments))


def call(arguments: argparse.Namespace) -> None:
    """Imports and runs the function of the chosen command."""
    getattr(importlib.import_module("elastic_lm.cli.convert"), arguments.command)(arguments)


def guard(program: str, debug: bool, run: Callable[[], None]) -> int:
    """Runs `run`; input that it refuses becomes one line on stderr and exit status 2."""
    try:
        run()
    except (ValueError, OSError, FloatingPointError) as error:
        if debug or os.environ.get("ELASTIC_LM_DEBUG"):
            traceback.print_exc()
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0


def one_line(error: Exception) -> str:
    """The message of an error on one line, with the file first where the system reports one."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__

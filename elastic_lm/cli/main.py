"""The `elastic-lm` command: flags become the options of one command, which runs; errors are one line.

Every command is a module of this folder with `HELP` (whose first line is the summary), `add_flags`, `Options`
and `run`. These modules import what is heavy only when they run, so that `--help` is instant.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from elastic_lm.cli import many_processes, signals
from elastic_lm.cli.parser import Parser, Version, add_command
from elastic_lm.files import compilation_cache
from elastic_lm.files.shortage import lacks_memory

# Modules of this folder, in the order of the help.
COMMANDS = (
    "quickstart",
    "plan",
    "convert",
    "export",
    "push",
    "train",
    "calibrate",
    "preview",
    "drafter",
    "latency",
    "subnets",
    "generate",
    "chat",
    "evaluate",
    "cascade",
    "bench",
)
OLD_NAMES = {"route": "cascade"}  # commands of 0.1

DESCRIPTION = """\
Pretrained language models whose compute is a dial.

  elastic-lm quickstart                 the whole story on a small model that comes with the package
  elastic-lm COMMAND --help             what a command does, with examples

A typical session on a model of your own:

  elastic-lm train --config ee_tuning --config.train.init_from=hf-dir --workdir runs/exits
  elastic-lm calibrate --model runs/exits/model --data held_out.txt --target 0.99 --out thresholds.json
  elastic-lm generate --model runs/exits/model --thresholds thresholds.json --prompt "Once upon"
"""
EPILOG = """\
Exit status: 0 done, 1 all that was asked for, or a run of a sweep, failed, 2 the input was refused, 70 an
unexpected error (please report it), 130 interrupted, 141 nobody reads the output, 143 terminated.
ELASTIC_LM_DEBUG=1 (or --debug after the command) shows where an error came from. Compiled programs are kept
in the user's cache folder, in ELASTIC_LM_CACHE=FOLDER, or not at all with ELASTIC_LM_CACHE=off.
"""

REFUSED, UNEXPECTED, INTERRUPTED = 2, 70, 130  # exit statuses; 70 is EX_SOFTWARE of sysexits.h
ISSUES = "https://github.com/elastic-lm/elastic_lm/issues"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments after the program's name; None = those of the process, which is the command's own then:
        signals end it, and it ends here.

    Returns:
      0 on success, 1 when all that was asked for failed, 2 when the input was refused, 70 after an error that
      nobody foresaw, 130 when interrupted, 141 when nobody reads the output, 143 when terminated.
    """
    signals.open_streams()
    if argv is not None:
        return _main(argv)
    signals.listen()
    compilation_cache.set_environment()
    signals.finish(_main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> int:
    signals.accept_any_text()
    parsed: list[argparse.Namespace] = []
    status = guard("elastic-lm", "--debug" in argv, lambda: parsed.append(_parsed(argv)))
    if status:
        return status
    flags = parsed[0]

    def run() -> int | None:
        try:
            options = flags.module.Options.from_flags(flags)
            many_processes.start(flags.command, options)
            signals.share_sigterm()  # jax has taken it where there are several processes
            return flags.module.run(options)
        except BaseException as error:
            signals.wait_for_end()  # what a signal breaks off may raise anything
            if what := many_processes.lost(error):
                raise OSError(what) from error
            raise

    status = guard(f"elastic-lm {flags.command}", flags.debug, run)
    many_processes.leave(status)
    return status


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a command, with its name and its module."""
    parser, commands = build_parsers()
    flags, rest = parser.parse_known_args(with_new_name(argv))

    # What overrides a config is not known to the parser; without a config, `plan` has none to override.
    if "overrides" in flags and (flags.command == "train" or "config" in flags):
        flags.overrides = rest
    elif rest:
        commands[flags.command].refuse(rest)
    return flags


def build_parsers() -> tuple[Parser, dict[str, Parser]]:
    """The top parser and the parser of every command."""
    parser = Parser(prog="elastic-lm", description=DESCRIPTION, epilog=EPILOG)
    parser.set_defaults(debug=False)
    parser.add_argument(
        "--version", action=Version, nargs=0, help="show the version, and those of jax and others"
    )
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    commands: dict[str, Parser] = {}
    for name in COMMANDS:
        module = importlib.import_module(f"elastic_lm.cli.{name}")
        commands[name] = add_command(choices, name, module)
    return parser, commands


def with_new_name(argv: Sequence[str]) -> list[str]:
    """The arguments, with the present name of a command that has been renamed, and a warning on stderr."""
    if not argv or argv[0] not in OLD_NAMES:
        return list(argv)
    new = OLD_NAMES[argv[0]]
    print(f"elastic-lm {argv[0]} is now elastic-lm {new}; the old name goes in 0.3", file=sys.stderr)
    return [new, *argv[1:]]


def guard(program: str, debug: bool, run: Callable[[], int | None]) -> int:
    """Runs `run`; whatever it raises becomes one line on stderr and an exit status.

    Args:
      program: the command as it is typed, which the line begins with.
      debug: the traceback is shown above the line.
      run: the command; what it returns is the status, None is 0.

    Returns:
      `REFUSED` for input that was refused, `UNEXPECTED` for an error that nobody foresaw.
    """
    signals.name_program(program)
    try:
        status = run() or 0
        _flush()  # what cannot be written is noticed here, not when the interpreter ends
    except KeyboardInterrupt:
        return signals.interrupted()
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        signals.wait_for_end()  # what is broken off may raise anything
        if signals.is_closed_pipe(error):
            return signals.CLOSED_PIPE
        shown = show_traceback(debug)
        if lacks_memory(error):
            what = f"does not fit into memory: use a smaller batch or model ({one_line(error)})"
            print(f"{program}: error: {what}", file=sys.stderr)
            return REFUSED
        if isinstance(error, ValueError | OSError | FloatingPointError):
            print(f"{program}: error: {one_line(error)}", file=sys.stderr)
            return REFUSED

        fix = "with what is above" if shown else "with what the same command prints with --debug"
        what = f"unexpected {type(error).__name__}: {one_line(error)}"
        print(f"{program}: error: {what} (please report it {fix}: {ISSUES})", file=sys.stderr)
        return UNEXPECTED
    return status


def show_traceback(debug: bool) -> bool:
    """Prints the traceback of the error that is being handled, where somebody asked for it."""
    wanted = debug or bool(os.environ.get("ELASTIC_LM_DEBUG"))
    if wanted:
        traceback.print_exc()
    return wanted


def one_line(error: BaseException) -> str:
    """The message of an error on one line, with the file first where the system reports one."""
    from elastic_lm.files.remote import with_addresses
    from elastic_lm.report.terminal import shown

    if isinstance(error, OSError) and error.strerror:
        from elastic_lm.files.atomic import DISK_ERRORS

        name = error.filename
        if name is None and error.errno in DISK_ERRORS and _stdout_fails(error.errno):
            name = "stdout"
        if name is not None:
            return shown(f"{with_addresses(name)}: {error.strerror}")
    return shown(with_addresses(" ".join(str(error).split()))) or type(error).__name__


def _flush() -> None:
    """Writes what was printed, or raises the system's error with the name of stdout."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from error


def _stdout_fails(number: int) -> bool:
    """Whether an error of the system is that of stdout, which keeps what it could not write.

    Without a buffer (PYTHONUNBUFFERED) it keeps nothing, and is tried with an empty line.
    """
    try:
        if getattr(sys.stdout, "write_through", False):
            sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        return error.errno == number
    except ValueError:  # closed
        return False
    return False

"""`elastic-lm chat`: a conversation with a chat model, line by line."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from elastic_lm.cli import generate, signals
from elastic_lm.cli.mesh_flag import add_mesh
from elastic_lm.cli.parser import add_colour, add_model
from elastic_lm.cli.width_flags import add_width

if TYPE_CHECKING:
    from elastic_lm.cli.conversation import Printer
    from elastic_lm.decode.chat import Chat
    from elastic_lm.decode.results import Sample

HELP = """\
Talks with a chat model; answers appear in the colours of depth.

elastic-lm chat --model chat-model
elastic-lm chat --model ckpt --thresholds thresholds.json --system "Answer in one sentence." --temperature 0.7
echo "What is the capital of France?" | elastic-lm chat --model chat-model

Every line is something that you say. The model reads all that was said, and computes what is new. Ctrl-C ends
an answer, Ctrl-D or /quit the conversation; /reset begins anew, /system TEXT says how the model is to answer
from then on and begins anew, /help lists this. Answers go to stdout, all else to stderr.
"""
COMMANDS = "/reset begins anew, /system TEXT begins anew with it, /quit ends; Ctrl-C ends an answer"
PROMPT = "> "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(generate.DecodingOptions):
    """Who answers, and how."""

    system: str | None = None  # how the model is to answer


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add = parser.add_argument
    add_model(parser)
    add_mesh(parser)
    add("--system", metavar="TEXT", help="says first how the model is to answer")
    add("--max-new-tokens", type=int, metavar="N", help=f"of an answer (default: {Options.max_new_tokens})")
    generate.add_exits(parser)
    add_width(parser)
    generate.add_sampling(parser)
    add("--raw", action="store_true", help="print control characters of answers as they are")
    add_colour(parser)


def run(options: Options) -> None:
    """Reads lines and answers them until there are no more."""
    from elastic_lm.cli.conversation import Printer, check_template
    from elastic_lm.decode.chat import Chat
    from elastic_lm.report import colour

    sampler, tokenizer = generate.make_sampler(options)
    check_template(tokenizer, options.model or "the embedded model")
    settings = options.given(generate.SETTINGS)
    n_layers, exits = generate.depths_of(sampler)
    colours = colour.terminal_colours(sys.stdout, options.color)
    printer = Printer(tokenizer, n_layers, colours, exits=exits, raw=options.raw)

    def begin(system: str | None) -> Chat:
        return Chat(sampler, system=system, max_new_tokens=options.max_new_tokens, **settings)

    chat = begin(options.system)
    interactive = sys.stdin.isatty()
    if interactive:
        print(COMMANDS, file=sys.stderr)
    for line in _lines(interactive):
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit", "/bye"):
            return
        if command == "/reset":
            chat.reset()
        elif command == "/system":
            chat = begin(rest.strip() or None)
        elif command.startswith("/"):
            known = "" if command == "/help" else f"{command} is no command. "
            print(known + COMMANDS, file=sys.stderr)
        elif line.strip():
            _answer(chat, printer, line, n_layers, interactive)


def _answer(chat: "Chat", printer: "Printer", line: str, n_layers: int, interactive: bool) -> None:
    """Prints what the model answers to a line, up to a Ctrl-C."""
    try:
        prompt = chat.prompt(line)
        with signals.interruptible() as interrupted, contextlib.closing(chat.stream_samples(line)) as samples:
            sample = printer.stream("", prompt, _until(samples, interrupted))
    except KeyboardInterrupt:  # where signals do not come to `signals`
        print(file=sys.stderr)
        return
    except ValueError as error:
        if not interactive:
            raise
        # A conversation that has become too long can go on after /reset.
        print(f"{error} (/reset begins anew)", file=sys.stderr)
        return
    if interactive:
        print(generate.stats_line(sample.stats, n_layers), file=sys.stderr)


def _until(samples: "Iterator[Sample]", interrupted: Callable[[], bool]) -> "Iterator[Sample]":
    """The samples up to a Ctrl-C."""
    for sample in samples:
        yield sample
        if interrupted():
            return


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of stdin, with a prompt where somebody types them."""
    if not interactive:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with _editing():
        while True:
            try:
                yield _typed_line()
            except EOFError:
                print(file=sys.stderr)
                return


def _typed_line() -> str:
    if sys.stdout.isatty():
        return input(PROMPT)  # which knows how wide the prompt is where the line is edited
    print(PROMPT, end="", file=sys.stderr, flush=True)
    return input()


@contextlib.contextmanager
def _editing() -> Iterator[None]:
    """Lets lines be edited and recalled, and puts the terminal back as it was however the command ends."""
    try:
        import readline  # noqa: F401 - `input` uses it once it is imported
        import termios
    except ImportError:
        yield
        return
    before = termios.tcgetattr(sys.stdin)

    def restore() -> None:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    with signals.saving(restore):
        yield

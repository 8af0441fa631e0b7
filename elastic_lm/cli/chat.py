"""`elastic-lm chat`: a conversation with a chat model, line by line."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, get_args

from elastic_lm.cli import generate, signals
from elastic_lm.cli.parser import (
    DEFAULT_COLOUR,
    Colour,
    ModelOptions,
    add_colour,
    add_model,
    require_colour,
)
from elastic_lm.cli.width_flags import SubnetText, add_width
from elastic_lm.config.decoding import MAX_NEW_TOKENS, WINDOW, Missing
from elastic_lm.config.subnet import Budget, Subnet

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
class Options(ModelOptions):
    """Who answers, and how; None = as the sampler does where nothing is said."""

    system: str | None = None  # how the model is to answer
    max_new_tokens: int = MAX_NEW_TOKENS  # of an answer
    thresholds: str | None = None  # file of an exit policy
    threshold: float | None = None  # one for every exit instead
    metric: str | None = None  # with threshold
    subnet: SubnetText | None = None  # a part of the model
    budget: Budget | None = None  # what the model that runs may cost
    latency_table: str | None = None  # with a budget of milliseconds
    context: int | None = None  # with a budget of FLOPs or bytes
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()  # texts that end an answer
    window: int = WINDOW
    fire_share: float | None = None
    lossless: bool = False
    lookup: bool = False  # with lossless
    preview: str | None = None  # file of a preview of the vocabulary head
    draft: int | None = None  # with lossless
    force: bool = False  # thresholds or a latency table of other weights are taken without a word
    missing: Missing = get_args(Missing)[0]
    raw: bool = False  # control characters in answers are printed as they are
    color: Colour = DEFAULT_COLOUR

    def __post_init__(self) -> None:
        require_colour(self.color)
        self.decoding()

    def decoding(self) -> generate.Options:
        """The same as options of `generate`, which checks them."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return generate.Options(**own, chat=True)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add = parser.add_argument
    add_model(parser)
    add("--system", metavar="TEXT", help="says first how the model is to answer")
    add("--max-new-tokens", type=int, metavar="N", help=f"of an answer (default: {Options.max_new_tokens})")
    generate.add_exits(parser)
    add_width(parser, "--context")
    generate.add_sampling(parser)
    add("--raw", action="store_true", help="print control characters of answers as they are")
    add_colour(parser)


def run(options: Options) -> None:
    """Reads lines and answers them until there are no more."""
    from elastic_lm.cli.conversation import Printer, check_template
    from elastic_lm.decode.chat import Chat
    from elastic_lm.report import colour

    decoding = options.decoding()
    sampler, tokenizer = generate.make_sampler(decoding)
    check_template(tokenizer, options.model or "the embedded model")
    runs = sampler.runs if isinstance(sampler.runs, Subnet) else Subnet.full(sampler.config)
    settings = decoding.given(generate.SETTINGS)
    colours = colour.terminal_colours(sys.stdout, options.color)
    exits = [new.layer for _, new in runs.exits(sampler.config)]
    printer = Printer(tokenizer, len(runs.layers), colours, exits=exits, raw=options.raw)

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
            _answer(chat, printer, line, len(runs.layers), interactive)


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
                yield input(PROMPT)
            except EOFError:
                print(file=sys.stderr)
                return


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

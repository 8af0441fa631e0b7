"""`elastic-lm generate`: prompts in, continuations with the depth of every token out."""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

from elastic_lm.cli.belonging import add_force, check_belongs, parts_of
from elastic_lm.cli.mesh_flag import add_mesh
from elastic_lm.cli.model_folder import load_with_tokenizer
from elastic_lm.cli.parser import (
    DEFAULT_COLOUR,
    Colour,
    ModelOptions,
    add_colour,
    add_model,
    local_place,
    metrics,
    require_colour,
    require_flag,
)
from elastic_lm.cli.width_flags import (
    SubnetAction,
    SubnetText,
    WidthOptions,
    add_width,
    check_same_part,
    chooser,
    chosen_drafter,
    chosen_subnet,
    subnet_line,
)
from elastic_lm.config.checks import AT_LEAST_1, require_choice, require_each
from elastic_lm.config.data import is_json_lines
from elastic_lm.config.decoding import MAX_NEW_TOKENS, WINDOW, Missing
from elastic_lm.config.exit_policy import DEFAULT_METRIC
from elastic_lm.config.mesh import MeshConfig
from elastic_lm.config.subnet import Budget, Subnet

if TYPE_CHECKING:
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.decode.results import Sample, SampleStatistics
    from elastic_lm.decode.sampler import Sampler
    from elastic_lm.depth.policies import ConfidenceExit
    from elastic_lm.report.colour import Colours

HELP = """\
Continues prompts; every token reports the depth that it needed.

elastic-lm generate --prompt "def main():" --max-new-tokens 100 --stream
elastic-lm generate --model ckpt --thresholds thresholds.json --prompts-file in.jsonl --json out.jsonl
elastic-lm generate --model ckpt --thresholds thresholds.json --prompt "Once" --temperature 0.8
elastic-lm generate --model ckpt --thresholds thresholds.json --prompt "Once" --lossless
elastic-lm generate --model ckpt --prompts-file chats.jsonl --lossless --lookup
elastic-lm generate --model ckpt --prompt "Once" --lossless --drafter layers=0-7,22-29 mlp=0.5
elastic-lm generate --model chat-model --chat --prompt "What is the capital of France?" --stream
elastic-lm generate --model ckpt --prompt "Once" --n 4 --temperature 1 --logprobs --json out.jsonl
elastic-lm generate --model ckpt --unprompted 200 --temperature 1 --json own.jsonl
elastic-lm generate --model ckpt --budget latency_ms=4 --latency-table latency.json --prompt "Once"

A prompts file has one prompt per line, or JSON lines with a `prompt` field, and may be packed (.gz); its
prompts run as one batch. Without --thresholds every token uses the full depth. --budget runs a sub-network
of a model that was trained with --config flextron, --subnet one that is named. Control characters in what
is printed are shown, like \\x1b, unless --raw is given, also where the output is a file; JSON has escapes of
its own.
"""

# Options that become fields of `decode.settings.Settings` and of `decode.options.DecodeOptions`.
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
DECODING = ("window", "fire_share", "lossless", "lookup", "draft", "missing")
ROWS = 32  # texts written at once where there is no prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingOptions(ModelOptions, WidthOptions):
    """How `generate` and `chat` write; None = as the sampler does where nothing is said."""

    max_new_tokens: int = MAX_NEW_TOKENS
    thresholds: str | None = None  # file of an exit policy
    threshold: float | None = None  # one for every exit instead
    metric: str | None = None  # with threshold; None = DEFAULT_METRIC
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()  # texts that end a continuation
    window: int = WINDOW
    fire_share: float | None = None
    lossless: bool = False
    lookup: bool = False  # with lossless
    preview: str | None = None  # file of a preview of the vocabulary head
    draft: int | None = None  # with lossless
    drafter: SubnetText | None = None  # with lossless
    force: bool = False  # thresholds or a latency table of other weights are taken without a word
    missing: Missing = get_args(Missing)[0]
    mesh: MeshConfig | None = None  # devices that share the work; None = the first one does it
    weights: str | None = None  # "int8" = kernels in 8 bits
    raw: bool = False  # control characters in texts are printed as they are
    color: Colour = DEFAULT_COLOUR

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        require_colour(self.color)
        require_each(self, "", ("max_new_tokens",), *AT_LEAST_1)
        require_flag(self.window >= 1, "--window", self.window, "must be at least 1")
        require_choice("--missing", self.missing, get_args(Missing))
        self._check_exits()
        WidthOptions.__post_init__(self)

    def _check_exits(self) -> None:
        """What goes with thresholds, and what goes with --lossless."""
        if self.thresholds and self.threshold is not None:
            raise ValueError(
                f"--thresholds {self.thresholds} and --threshold {self.threshold}: give one of them"
            )
        if self.metric is not None and self.threshold is None:
            raise ValueError(f"--metric {self.metric}: goes with --threshold; a thresholds file has its own")
        if self.draft is not None and not self.lossless:
            raise ValueError(f"--draft {self.draft}: drafts are verified with --lossless only; add it")
        if self.lookup and not self.lossless:
            raise ValueError("--lookup: copied tokens are verified with --lossless only; add it")
        if self.drafter is not None:
            self._check_drafter(self.drafter)
            return

        if self.thresholds or self.threshold is not None:
            return
        if self.lossless and not self.lookup:
            raise ValueError(
                "--lossless: nothing drafts; give --lookup, --drafter, --thresholds or --threshold"
            )
        if self.missing == "propagate":
            raise ValueError("--missing propagate: is about early tokens; give --thresholds or --threshold")

    def _check_drafter(self, drafter: SubnetText) -> None:
        """What goes with --drafter."""
        flag = f"--drafter {drafter.text}"
        if not self.lossless:
            raise ValueError(f"{flag}: drafts are verified with --lossless only; add it")
        others = {
            "--lookup": self.lookup,
            "--thresholds": self.thresholds,
            "--threshold": self.threshold is not None,
            "--missing propagate": self.missing == "propagate",
            "--subnet": self.subnet,
            "--budget": self.budget,
        }
        for other in (name for name, given in others.items() if given):
            raise ValueError(f"{flag}: drafts alone, for the whole model; leave {other} out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DecodingOptions):
    """What is generated, and where it goes."""

    prompt: tuple[str, ...] = ()
    prompts_file: str | None = None  # one prompt per line, or JSON lines
    chat: bool = False  # prompts are what a user says to a chat model
    system: str | None = None  # with chat: what stands before
    n: int | None = None  # continuations per prompt
    unprompted: int = 0  # texts that the model begins by itself
    stream: bool = False
    logprobs: bool = False  # with json: log-probabilities of tokens
    top_logprobs: int = 0  # and of so many likeliest ones
    json: str | None = None  # file for JSON lines; - = stdout
    profile: str | None = None  # folder for a trace of JAX's profiler

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_unprompted()
        self._check_samples()
        if self.profile and (self.stream or self.unprompted):
            flag = "--stream" if self.stream else "--unprompted"
            raise ValueError(f"--profile {self.profile}: traces one call for all prompts; leave {flag} out")

    def _check_unprompted(self) -> None:
        """What goes with --unprompted."""
        count = self.unprompted
        require_flag(count >= 0, "--unprompted", count, "must be at least 1")
        if not count:
            return
        if self.prompt or self.prompts_file:
            raise ValueError(f"--unprompted {count}: the model begins by itself; leave prompts out")
        if self.stream:
            raise ValueError(f"--unprompted {count}: writes many texts at once; leave --stream out")
        if not self.temperature and count > 1:
            raise ValueError(f"--unprompted {count}: greedy texts are all the same; give --temperature 1")

    def _check_samples(self) -> None:
        """What goes with --chat, --n and --logprobs."""
        if self.system is not None and not self.chat:
            raise ValueError(f"--system {self.system}: goes with --chat; add it")
        if self.chat and self.unprompted:
            raise ValueError(f"--unprompted {self.unprompted}: the model begins by itself; leave --chat out")
        if self.n is not None:
            require_flag(self.n >= 1, "--n", self.n, "must be at least 1")
            alone = not self.stream and not self.unprompted
            require_flag(alone, "--n", self.n, "goes without --stream and --unprompted; leave them out")
            varied = self.n == 1 or bool(self.temperature)
            require_flag(varied, "--n", self.n, "greedy samples are all the same; give --temperature 1")
        require_flag(self.top_logprobs >= 0, "--top-logprobs", self.top_logprobs, "must be at least 0")
        wanted = self.logprobs or self.top_logprobs
        if wanted and (self.json is None or self.stream or self.unprompted):
            name = "--logprobs" if self.logprobs else f"--top-logprobs {self.top_logprobs}"
            raise ValueError(
                f"{name}: stand in the JSON lines of prompts; give --json FILE, and leave --stream and "
                "--unprompted out"
            )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add_model(parser)
    add_mesh(parser)
    _add_prompts(parser)
    add_exits(parser)
    add_width(parser)
    add_old_context(parser)
    add_sampling(parser)
    _add_output(parser)


class OldContext(argparse.Action):
    """--context of 0.1, now --budget-context: elsewhere it means the tokens that are seen at once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Keeps the number, and names the flag."""
        print("generate --context is now --budget-context; the old name goes in 0.3", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_old_context(parser: argparse.ArgumentParser) -> None:
    """Adds the name that --budget-context had in 0.1."""
    parser.add_argument(
        "--context", type=int, action=OldContext, dest="budget_context", help=argparse.SUPPRESS
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="may be given several times")
    add("--prompts-file", metavar="FILE", help="one prompt per line, or .jsonl")
    add("--chat", action="store_true", help="prompts are what a user says: the chat template is applied")
    add("--system", metavar="TEXT", help="with --chat: says first how the model is to answer")
    add("--n", type=int, metavar="N", help="continuations per prompt, each with a seed of its own")
    unprompted = "N texts from the model's first token on instead, as JSON lines, e.g. to calibrate on"
    add("--unprompted", type=int, metavar="N", help=unprompted)
    add("--max-new-tokens", type=int, metavar="N", help=f"default: {Options.max_new_tokens}")


def add_exits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--thresholds", metavar="FILE", help="from `calibrate` or `quickstart`")
    add("--threshold", type=float, metavar="C", help="one confidence for every exit instead (0 exits always)")
    add("--metric", help=f"with --threshold: {metrics(gates=True)} (default: {DEFAULT_METRIC})")
    window = f"tokens that may wait for their deep layers (default: {DecodingOptions.window})"
    add("--window", type=int, metavar="W", help=window)
    add("--fire-share", type=float, metavar="S", help="0 = lowest latency, 1 = throughput (default: 0)")
    add("--lossless", action="store_true", help="early tokens are drafts, verified by the full model")
    lookup = "with --lossless: drafts what followed the last tokens earlier in the text"
    add("--lookup", action="store_true", help=lookup)
    add("--preview", metavar="FILE", help="of the vocabulary head, from `elastic-lm preview`")
    add("--draft", type=int, metavar="K", help="with --lossless: drafts per verification (default: adapts)")
    drafter = "with --lossless: a part of the model that drafts, as in --subnet, or a JSON file"
    add("--drafter", nargs="+", action=SubnetAction, metavar="KEY=SHARE", help=drafter)
    add_force(parser, "thresholds or a latency table")
    missing = "keys and values of early tokens in deeper layers: computed later, or CALM's approximation "
    missing += f"(default: {DecodingOptions.missing})"
    add("--missing", choices=get_args(Missing), help=missing)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    kernels = "kernels in 8 bits: a quarter of float32's memory; faster on GPUs and TPUs alone"
    add("--weights", choices=("int8",), help=kernels)
    add("--temperature", type=float, help="0 = always the likeliest token (default: 0)")
    add("--top-k", type=int, metavar="K", help="0 = all (default: 0)")
    add("--top-p", type=float, metavar="P", help="1 = all (default: 1)")
    add("--min-p", type=float, metavar="P", help="relative to the likeliest; 0 = none (default: 0)")
    add("--repetition-penalty", type=float, metavar="R", help="1 = none (default: 1)")
    add("--seed", type=int, help="of the draws (default: 0)")
    add("--stop", action="append", metavar="TEXT", help="ends a text; may be given several times")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--stream", action="store_true", help="print while generating (one prompt)")
    add("--json", metavar="FILE", help="JSON lines: prompt, text, tokens, exit_layers, stats; - = stdout")
    add("--logprobs", action="store_true", help="with --json: log-probability of every token")
    add("--top-logprobs", type=int, metavar="K", help="with --json: and of the K likeliest (default: 0)")
    add("--raw", action="store_true", help="print control characters of texts as they are")
    text = "generate twice, and trace the second time, in which nothing compiles, with JAX's profiler"
    add("--profile", metavar="DIR", type=local_place, help=text)
    add_colour(parser)


def run(options: Options) -> None:
    """Continues the prompts, or lets the model begin by itself."""
    from elastic_lm.cli import conversation
    from elastic_lm.decode.chat import end_tokens
    from elastic_lm.files.atomic import prepare_output

    # What is refused is refused before the model is loaded.
    prompts = [] if options.unprompted else read_prompts(options.prompt, options.prompts_file)
    prepare_output(options.json)
    if options.stream and len(prompts) > 1:
        raise ValueError(f"--stream shows one prompt at a time and there are {len(prompts)}: leave it out")

    sampler, tokenizer = make_sampler(options)
    settings = options.given(SETTINGS)
    if options.unprompted:
        samples = unprompted(sampler, tokenizer, options.unprompted, options.max_new_tokens, settings)
        write_json(options.json or "-", [""] * options.unprompted, samples)
        return

    asked: list[Any] = list(prompts)
    if options.chat:
        name = options.model or "the embedded model"
        asked = [conversation.prompt_ids(tokenizer, name, prompt, options.system) for prompt in prompts]
        settings["stop_tokens"] = end_tokens(tokenizer)

    write = _stream if options.stream else _print_samples
    texts = write(options, sampler, tokenizer, prompts, asked, settings)
    conversation.hint(tokenizer, options.chat, texts)


def _stream(
    options: Options,
    sampler: "Sampler",
    tokenizer: "Tokenizer",
    prompts: list[str],
    asked: list[Any],
    settings: dict[str, Any],
) -> list[str]:
    """Prints the only prompt and its continuation while that is made; returns the text."""
    from elastic_lm.cli.conversation import Printer
    from elastic_lm.report.colour import terminal_colours

    n_layers, exits = depths_of(sampler)
    colours = terminal_colours(sys.stdout, options.color)
    printer = Printer(tokenizer, n_layers, colours, exits=exits, raw=options.raw)

    before = "" if options.chat else prompts[0]
    ids = asked[0] if options.chat else tokenizer.encode(prompts[0], bos=True)
    samples = sampler.stream_samples(ids, options.max_new_tokens, **settings)
    return [printer.stream(before, ids, samples).text]


@contextlib.contextmanager
def _traced(folder: str | None) -> Iterator[None]:
    """Lets JAX's profiler trace the block into a folder; None = nothing is traced."""
    if not folder:
        yield
        return
    import jax

    from elastic_lm.report.profile import how_to_look

    with jax.profiler.trace(folder, create_perfetto_trace=True):
        yield
    print(f"{folder}: traced; {how_to_look(folder)}", file=sys.stderr)


def _print_samples(
    options: Options,
    sampler: "Sampler",
    tokenizer: "Tokenizer",
    prompts: list[str],
    asked: list[Any],
    settings: dict[str, Any],
) -> list[str]:
    """Continues all prompts at once, and writes and prints what they became; returns the texts."""
    from elastic_lm.report.colour import terminal_colours

    settings = settings | {"logprobs": options.logprobs, "top_logprobs": options.top_logprobs}
    settings |= options.given(("n",))
    if options.profile:
        sampler.sample(asked, options.max_new_tokens, **settings)  # compiles, which is not to be traced
    with _traced(options.profile):
        samples = sampler.sample(asked, options.max_new_tokens, **settings)
    if options.n is not None:
        samples = [sample for group in samples for sample in group]
        prompts, asked = ([one for one in each for _ in range(options.n)] for each in (prompts, asked))

    if options.json:
        write_json(options.json, prompts, samples)
    if options.json != "-":
        n_layers, exits = depths_of(sampler)
        colours = terminal_colours(sys.stdout, options.color)
        ids = [tokenizer.encode(one, bos=True) if isinstance(one, str) else one for one in asked]
        shown = [""] * len(prompts) if options.chat else prompts
        show(tokenizer, n_layers, shown, ids, samples, colours, exits=exits, raw=options.raw)
    return [sample.text for sample in samples]


def depths_of(sampler: "Sampler") -> tuple[int, list[int]]:
    """Layers of what runs and of its exits; of the whole model where routers choose widths."""
    runs = _part(sampler)
    return len(runs.layers), [new.layer for _, new in runs.exits(sampler.config)]


def _part(sampler: "Sampler") -> Subnet:
    return sampler.runs if isinstance(sampler.runs, Subnet) else Subnet.full(sampler.config)


def make_sampler(options: DecodingOptions) -> "tuple[Sampler, Tokenizer]":
    """The sampler that the options describe, and the model's tokenizer; tells on stderr which part runs.

    Raises:
      ValueError: the model has no exits for the thresholds, or no widths for the budget.
    """
    from elastic_lm.decode.options import DecodeOptions
    from elastic_lm.decode.sampler import Sampler
    from elastic_lm.depth.preview_files import check_head, load_preview

    model, params, tokenizer, folder = load_with_tokenizer(
        options.model, options.dtype, options.mesh, weights=options.weights
    )
    how: dict[str, Any] = options.given(DECODING)
    parts = parts_of(params, tokenizer) if options.thresholds or options.latency_table else {}
    policy = exit_policy(model.config, options)
    if policy and options.thresholds:
        policy.check(model.config)
        policy = for_this_model(policy, options, folder, parts)
    how["exit"] = policy

    if options.preview:
        how["preview"] = load_preview(options.preview, model.config)[0]
        check_head(how["preview"], model.config, params, options.preview)
    if options.budget:
        elastic = chooser(
            folder,
            model.config,
            options.budget,
            latency_table=options.latency_table,
            context=options.budget_context,
            parts=parts,
            force=options.force,
        )
        how |= {"budget": options.budget, "elastic": elastic}
    if options.subnet:
        how["subnet"] = chosen_subnet(options, folder, model.config, params, tokenizer, force=options.force)

    if options.drafter:
        how["drafter"] = chosen_drafter(options.drafter, model.config, folder)

    sampler = Sampler(model, params, tokenizer, options=DecodeOptions(**how))
    if isinstance(sampler.runs, Budget):
        print(f"{options.budget}: widths are chosen token by token", file=sys.stderr)
    elif options.budget:
        print(subnet_line(sampler.config, _part(sampler)), file=sys.stderr)
    if policy and options.thresholds:
        _check_part(options.thresholds, policy, sampler, options)
    return sampler, tokenizer


def _check_part(file: str, policy: "ConfidenceExit", sampler: "Sampler", options: DecodingOptions) -> None:
    """Says where thresholds were calibrated on another part of the model than the one that runs."""
    runs = sampler.runs if isinstance(sampler.runs, Subnet) else None
    promise = policy.guarantee is not None and policy.guarantee.achieved and not options.lossless
    recorded = policy.calibrated_on
    check_same_part(file, recorded, runs, sampler.config, promise=promise, force=options.force)


def exit_policy(config: "ModelConfig", options: DecodingOptions) -> "ConfidenceExit | None":
    """The policy of a thresholds file, one threshold for every exit, or None for full depth.

    Raises:
      ValueError: the model has no exits.
    """
    from elastic_lm.depth.policies import ConfidenceExit

    if not options.thresholds and options.threshold is None:
        return None
    if not config.exits:
        raise ValueError("the model has no exits: attach and tune them first (quickstart, or train)")
    if options.thresholds:
        return ConfidenceExit.load(options.thresholds)
    assert options.threshold is not None
    layers = tuple(e.layer for e in config.exits)
    thresholds = (options.threshold,) * len(layers)
    return ConfidenceExit(metric=options.metric or DEFAULT_METRIC, thresholds=thresholds, layers=layers)


def for_this_model(
    policy: "ConfidenceExit", options: DecodingOptions, folder: str, parts: dict[str, str]
) -> "ConfidenceExit":
    """The policy of a thresholds file, after a warning where it was calibrated on another model.

    Raises:
      ValueError: it was, and it promises something that full-depth verification does not keep anyway.
    """
    guaranteed = policy.guarantee is not None and policy.guarantee.achieved and not options.lossless
    file = options.thresholds or ""
    check_belongs(
        file,
        policy.calibrated_on,
        fitted="calibrated",
        model=folder,
        parts=parts,
        fix=f"calibrate again: elastic-lm calibrate --model {folder} --out {file}",
        force=options.force,
        promise="its guarantee is about that model alone" if guaranteed else "",
    )
    return policy.for_any_weights()


def unprompted(
    sampler: "Sampler", tokenizer: "Tokenizer", count: int, max_new_tokens: int, settings: dict[str, Any]
) -> "list[Sample]":
    """Texts that the model writes from its first token on, e.g. to calibrate or train exits on.

    Args:
      sampler: of the model.
      tokenizer: the beginning-of-text token comes first, or the end-of-text token where there is none.
      count: how many texts.
      max_new_tokens: longest text, in tokens.
      settings: fields of `decode.settings.Settings`; text i draws with seed + i.

    Returns:
      `count` samples; the statistics of each are those of its batch.

    Raises:
      ValueError: the tokenizer has neither token.
    """
    ends = tokenizer.eos_ids
    first = tokenizer.bos_id if tokenizer.bos_id is not None else ends[0] if ends else None
    if first is None:
        raise ValueError("--unprompted: the tokenizer has no token that begins or ends a text; give prompts")

    samples: list[Sample] = []
    began = time.perf_counter()
    while len(samples) < count:
        done = len(samples)
        # Every batch is whole, so that one program is compiled; texts beyond the count are dropped.
        seeds = [(settings.get("seed", 0) + done + i) % 2**32 for i in range(ROWS)]
        batch = sampler.sample([[first]] * ROWS, max_new_tokens, **{**settings, "seed": seeds})
        samples += batch[: count - done]
        left = (time.perf_counter() - began) / len(samples) * (count - len(samples))
        print(f"{len(samples)}/{count} texts, {left:.0f} s left", file=sys.stderr)
    return samples


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """Prompts from the command line and from a file.

    Args:
      given: values of --prompt.
      file: one prompt per line, or JSON lines with a `prompt` field where the name ends in .jsonl.

    Raises:
      ValueError: there is no prompt, one is empty, or a line cannot be read; names the line.
    """
    from elastic_lm.files.text_files import check_whole, read_lines

    named = [(f"--prompt {i}", text) for i, text in enumerate(given, 1)]
    if file:
        lines = enumerate(read_lines(file), 1)
        named += [(f"{file} line {i}", _prompt(file, i, line)) for i, line in lines if line.strip()]
    if not named:
        raise ValueError("no prompt: give --prompt TEXT or --prompts-file FILE")
    for where, text in named:
        if not text:
            raise ValueError(f"{where} is empty: give at least one character")
        check_whole(f"{where}: prompt={text[:80]!r}", text)
    return [text for _, text in named]


def _prompt(file: str, number: int, line: str) -> str:
    from elastic_lm.files.text_files import parse_object

    if not is_json_lines(file):
        return line
    where = f"{file} line {number}"
    record = parse_object(where, line)
    if "prompt" not in record:
        raise ValueError(f'{where}: expected a JSON object with a "prompt"; found: {", ".join(record)}')
    prompt = record["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: prompt={prompt!r} must be a string")
    return prompt


def show(
    tokenizer: "Tokenizer",
    n_layers: int,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    samples: "Sequence[Sample]",
    colours: "Colours | None",
    *,
    exits: Sequence[int] = (),
    raw: bool = False,
) -> None:
    """Prints each prompt with its continuation, and one line of statistics on stderr.

    Args:
      tokenizer: of the model.
      n_layers: of what ran.
      prompts: as they were given; "" = not printed.
      ids: of what the samples continue.
      samples: their continuations.
      colours: of the terminal; None = plain text.
      exits: layers of the exits of what ran.
      raw: control characters are printed as they are.
    """
    from elastic_lm.decode.results import sample_spans
    from elastic_lm.report.colour import to_ansi
    from elastic_lm.report.terminal import shown

    safe = str if raw else shown
    for prompt, before, sample in zip(prompts, ids, samples, strict=True):
        text = safe(sample.text)
        if colours:
            parts = sample_spans(tokenizer, before, sample)
            text = to_ansi([(safe(p), depth) for p, depth in parts], n_layers, colours, exits=exits)
        print(safe(prompt) + text)

    stats = samples[0].stats
    print(stats_line(stats, n_layers), file=sys.stderr)
    if stats.drafted:
        print(
            f"{stats.drafted} drafted tokens, {stats.acceptance:.1%} accepted, {stats.wasted} wasted, "
            f"{stats.accepted_per_verification:.2f} accepted per verification, "
            + (f"drafter ran {stats.drafter_ticks} times, " if stats.drafter_ticks else "")
            + f"deepest layers ran {stats.segment_ticks[-1]} times",
            file=sys.stderr,
        )


def stats_line(stats: "SampleStatistics", n_layers: int) -> str:
    """Tokens, their speed, the bytes that it takes and their depths, in one line."""
    counts = ", ".join(f"{n} after {depth} layers" for depth, n in stats.exit_counts.items())
    read = "" if stats.gb_per_s is None else f", {bandwidth(stats.gb_per_s)}"
    return (
        f"{stats.tokens} tokens, {stats.tokens_per_s:.1f}/s{read} (compilation included), "
        f"mean {stats.mean_layers:.2f} of {n_layers} layers: {counts}"
    )


def bandwidth(gb_per_s: float) -> str:
    """Gigabytes per second, and the share of what is published of the device, where that is known."""
    import jax

    from elastic_lm.cost.device_kinds import bandwidth_share

    share = bandwidth_share(gb_per_s, jax.devices()[0].device_kind)
    return f"{gb_per_s:.1f} GB/s" + ("" if share is None else f" ({share:.0%} of its memory's)")


def write_json(path: str, prompts: Sequence[str], samples: "Sequence[Sample]") -> None:
    """Writes one JSON object per prompt: prompt, text, tokens, exit_layers, stats; - = stdout."""
    from elastic_lm.files.atomic import write_text_whole

    pairs = zip(prompts, map(dataclasses.asdict, samples), strict=True)
    # What was not asked for is left out.
    asked = [(prompt, {k: v for k, v in fields.items() if v is not None}) for prompt, fields in pairs]
    lines = [json.dumps({"prompt": prompt, **fields}) + "\n" for prompt, fields in asked]
    if path == "-":
        sys.stdout.writelines(lines)
    else:
        write_text_whole(path, "".join(lines))

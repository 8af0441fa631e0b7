"""`elastic-lm generate`: prompts in, continuations with the depth of every token out."""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from elastic_lm.cli.held_out import load_with_tokenizer
from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Subnet
from elastic_lm.cost.counted import Workload
from elastic_lm.cost.latency_table import LatencyTable
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.results import Sample, sample_spans
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.files.atomic import prepare_output
from elastic_lm.report import colour as render
from elastic_lm.width.chooser import SubnetChooser

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
ROWS = 32  # texts written at once where there is no prompt


def run(args: argparse.Namespace) -> None:
    """Runs `elastic-lm generate`."""
    prompts = [] if args.unprompted else read_prompts(args.prompt, args.prompts_file)
    check_unprompted(args)
    prepare_output(args.json)
    if args.draft is not None and not args.lossless:
        raise ValueError(f"--draft {args.draft}: drafts are verified with --lossless only; add it")
    if args.metric and args.threshold is None:
        raise ValueError(f"--metric {args.metric}: goes with --threshold; a thresholds file has its own")
    early = args.thresholds or args.threshold is not None
    if args.lossless and not early:
        raise ValueError("--lossless: without exits nothing is drafted; give --thresholds or --threshold")
    if args.missing == "propagate" and not early:
        raise ValueError("--missing propagate: is about early tokens; give --thresholds or --threshold")
    if args.stream and len(prompts) > 1:
        raise ValueError(f"--stream shows one prompt at a time and there are {len(prompts)}: leave it out")
    budget = read_budget(args.budget, args.latency_table, args.context)
    model, params, tokenizer, folder = load_with_tokenizer(args.model)
    policy = exit_policy(model.config, args.thresholds, args.threshold, args.metric or "max_prob")
    sampler = Sampler(
        model,
        params,
        tokenizer,
        exit=policy,
        window=args.window,
        fire_share=args.fire_share,
        lossless=args.lossless,
        draft=args.draft,
        missing=args.missing,
        elastic=elastic_choices(folder, model.config, budget, args) if budget else None,
        budget=budget,
    )
    ran = sampler.runs if isinstance(sampler.runs, Subnet) else Subnet.full(model.config)
    if isinstance(sampler.runs, Budget):
        print(f"{budget}: widths are chosen token by token", file=sys.stderr)
    elif budget:
        print(subnet_line(model.config, ran), file=sys.stderr)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"stop": tuple(args.stop)}
    if args.stream:
        stream(sampler, prompts[0], args.max_new_tokens, settings)
        return
    if args.unprompted:
        samples = unprompted(sampler, tokenizer, args.unprompted, args.max_new_tokens, settings)
        write_json(args.json or "-", [""] * args.unprompted, samples)
        return
    samples = sampler.sample(prompts, args.max_new_tokens, **settings)
    if args.json:
        write_json(args.json, prompts, samples)
    if args.json != "-":
        colour = render.wants_colour(sys.stdout, args.color)
        show(tokenizer, len(ran.layers), prompts, samples, colour)


def read_budget(
    given: dict[str, float] | None, latency_table: str | None, context: int | None = None
) -> Budget | None:
    """The budget of --budget.

    Raises:
      ValueError: its amount is out of range, or a latency table is missing, or it or the context not read.
    """
    if context is not None and not {"flops", "memory_bytes"} & set(given or {}):
        raise ValueError(f"--context {context}: is read for --budget flops=N or memory_bytes=N; add one")
    if latency_table and "latency_ms" not in (given or {}):
        raise ValueError(f"--latency-table {latency_table}: is read for --budget latency_ms=N; add that")
    if given is None:
        return None
    budget = Budget(**given)
    if budget.kind == "latency_ms" and not latency_table:
        raise ValueError(
            f"--budget latency_ms={budget.amount:g}: needs --latency-table FILE; write one: "
            "elastic-lm latency build --model DIR"
        )
    return budget


def elastic_choices(
    folder: str, config: ModelConfig, budget: Budget, args: argparse.Namespace
) -> SubnetChooser:
    """The choices of a checkpoint, with the latency table or the context that the flags name.

    Raises:
      ValueError: a context is named, and the checkpoint's routers were trained for another one.
    """
    found = SubnetChooser.load(folder, config)
    if args.latency_table:
        return found.with_latency(LatencyTable.load(args.latency_table), args.latency_table)
    if args.context is not None:
        routed = found.routers is not None and found.routers.table.kind == budget.kind
        fix = "the routers of this model keep to the context that they were trained for; leave it out"
        require(not routed, "--context", args.context, fix)
        return dataclasses.replace(found, workload=Workload(context=args.context))
    return found


def subnet_line(config: ModelConfig, subnet: Subnet) -> str:
    """How much of a model a sub-network is, in one line."""

    def sizes(of: Subnet) -> tuple[int, int, int]:
        heads = sum(h * g for h, g in zip(of.heads, of.groups, strict=True))
        return len(of.layers), sum(of.mlp), heads

    pairs = zip(sizes(subnet), sizes(Subnet.full(config)), ("layers", "neurons", "heads"), strict=True)
    return "runs " + ", ".join(f"{kept} of {whole} {unit}" for kept, whole, unit in pairs)


def check_unprompted(args: argparse.Namespace) -> None:
    """Refuses what does not go with --unprompted.

    Raises:
      ValueError: names the flag and the fix.
    """
    count = args.unprompted
    if count < 0:
        raise ValueError(f"--unprompted {count}: must be at least 1")
    if not count:
        return
    if args.prompt or args.prompts_file:
        raise ValueError(f"--unprompted {count}: the model begins by itself; leave prompts out")
    if args.stream:
        raise ValueError(f"--unprompted {count}: writes many texts at once; leave --stream out")
    if args.temperature == 0 and count > 1:
        raise ValueError(f"--unprompted {count}: greedy texts are all the same; give --temperature 1")


def unprompted(
    sampler: Sampler, tokenizer: Tokenizer, count: int, max_new_tokens: int, settings: dict[str, Any]
) -> list[Sample]:
    """Texts that the model writes from its first token on, e.g. to calibrate or train exits on.

    Args:
      sampler: of the model.
      tokenizer: its beginning-of-text token, or else what ends a text, comes first.
      count: how many texts.
      max_new_tokens: longest text, in tokens.
      settings: fields of `requests.Settings`; text i draws with seed + i.

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
        seeds = [settings.get("seed", 0) + done + i for i in range(ROWS)]  # whole batches: one program
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
    named = [(f"--prompt {i}", text) for i, text in enumerate(given, 1)]
    if file:
        lines = _read_lines(file)
        named += [
            (f"{file} line {i}", _prompt(file, i, line)) for i, line in enumerate(lines, 1) if line.strip()
        ]
    if not named:
        raise ValueError("no prompt: give --prompt TEXT or --prompts-file FILE")
    for where, text in named:
        if not text:
            raise ValueError(f"{where} is empty: give at least one character")
        if text != text.encode("utf-8", "ignore").decode("utf-8"):
            raise ValueError(
                f"{where}: prompt={text!r} holds half of a character; give complete Unicode text"
            )
    return [text for _, text in named]


def _read_lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text ({error}); convert it first") from error


def _prompt(file: str, number: int, line: str) -> str:
    if not file.endswith(".jsonl"):
        return line
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{file} line {number}: expected a JSON object with a "prompt"') from None
    if not isinstance(prompt, str):
        raise ValueError(f"{file} line {number}: prompt={prompt!r} must be a string")
    return prompt


def exit_policy(
    config: ModelConfig, thresholds: str | None, threshold: float | None, metric: str
) -> ConfidenceExit | None:
    """The policy of a thresholds file, one threshold for every exit, or None for full depth.

    Raises:
      ValueError: both are given, or the model has no exits.
    """
    if thresholds and threshold is not None:
        raise ValueError(f"--thresholds {thresholds} and --threshold {threshold}: give one of them")
    if (thresholds or threshold is not None) and not config.exits:
        raise ValueError("the model has no exits: attach and tune them first (quickstart, or train)")
    if thresholds:
        return ConfidenceExit.load(thresholds)
    if threshold is None:
        return None
    layers = tuple(e.layer for e in config.exits)
    return ConfidenceExit(metric=metric, thresholds=(threshold,) * len(layers), layers=layers)


def stream(sampler: Sampler, prompt: str, max_new_tokens: int, settings: dict[str, Any]) -> None:
    """Prints a prompt and its continuation while it is generated."""
    print(prompt, end="", flush=True)
    for piece in sampler.stream(prompt, max_new_tokens, **settings):
        print(piece, end="", flush=True)
    print()


def show(
    tokenizer: Tokenizer, n_layers: int, prompts: Sequence[str], samples: Sequence[Sample], colour: bool
) -> None:
    """Prints each prompt with its continuation, and one line of statistics on stderr."""
    for prompt, sample in zip(prompts, samples, strict=True):
        text = sample.text
        if colour:
            before = tokenizer.encode(prompt, bos=True)
            text = render.to_ansi(sample_spans(tokenizer, before, sample), n_layers)
        print(prompt + text)
    stats = samples[0].stats
    counts = ", ".join(f"{n} after {depth} layers" for depth, n in stats.exit_counts.items())
    print(
        f"{stats.tokens} tokens, {stats.tokens_per_s:.1f}/s (compilation included), "
        f"mean {stats.mean_layers:.2f} of {n_layers} layers: {counts}",
        file=sys.stderr,
    )
    if stats.drafted:
        print(
            f"{stats.drafted} drafted tokens, {stats.acceptance:.1%} accepted, {stats.wasted} wasted, "
            f"deepest layers ran {stats.segment_ticks[-1]} times",
            file=sys.stderr,
        )


def write_json(path: str, prompts: Sequence[str], samples: Sequence[Sample]) -> None:
    """Writes one JSON object per prompt: prompt, text, tokens, exit_layers, stats; - = stdout."""
    with _open(path) as file:
        for prompt, sample in zip(prompts, samples, strict=True):
            file.write(json.dumps({"prompt": prompt, **dataclasses.asdict(sample)}) + "\n")


@contextlib.contextmanager
def _open(path: str) -> Iterator[TextIO]:
    if path == "-":
        yield sys.stdout
        return
    with Path(path).open("w", encoding="utf-8") as file:
        yield file

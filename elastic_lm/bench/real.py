"""What each dial gives on a pretrained model of one's own, and what the plan forecast; needs --model.

`elastic-lm bench real --model DIR --data FILES` fits on the first nine tenths of the text and measures on the
rest. Batch 1; the time of a one-token call is taken off; sides take turns.

- real/full_vs_llamacpp: tokens/s at full depth; ideal = llama.cpp's on the same weights in float32, with as
  many threads. The note says how many generated tokens are the same, and the bytes read per second.
  Skipped, with a line, where `xllamacpp` or `gguf` is not installed or the model is no plain Llama.
- real/cheap_head: speed relative to full depth with a preview of the vocabulary head for 99.95 % of the
  tokens; ideal = the plan's forecast. The note says how many generated tokens are those of full depth.
- real/exits_95, real/exits_99: speed relative to full depth with the exit that the plan finds best, fitted in
  closed form, at this agreement; ideal = the plan's forecast.
- real/lookup_copy: lossless decoding with prompt lookup where a text has just been read twice and begins a
  third time, greedy; ideal = the plan's forecast.
- real/lookup_prose: the same where prose is continued at temperature 0.8; ideal = 1, no loss.
- real/lookup_and_exits: lossless decoding with the exit and lookup together on both kinds of prompts;
  ideal = the faster of the two alone.
- real/plan: the worst of measured / forecast over all configurations that the plan forecasts and that are
  measured here, good ones and bad ones; ideal = 1. The note lists each: measured, forecast.

Lossless rows raise where a token differs from full depth.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elastic_lm.bench import llama_cpp
from elastic_lm.bench import plan as planning
from elastic_lm.bench.forecasts import Configuration
from elastic_lm.bench.report import Measurement, Options
from elastic_lm.bench.timing import bandwidth_note, interleave, matvec_bandwidth
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.config.decoding import PREVIEW_AGREEMENT, WINDOW
from elastic_lm.config.model import ModelConfig
from elastic_lm.cost.counted import Workload
from elastic_lm.data import pipeline
from elastic_lm.data.batch import Batch
from elastic_lm.data.sources import Document
from elastic_lm.data.splitting import data_config
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.exits import without_exits
from elastic_lm.report.machine import usable_cores

NEW_TOKENS, MOST_TOKENS = 48, 512  # per call
LEAST_SECONDS = 0.5  # of a call at full depth, as far as the context goes
PROMPTS = 3  # of each kind
BATCH = 4  # rows of the configuration that is forecast for more than one
FIT_TOKENS = 16_384  # of a pass over text
EXITS = (0.95, 0.99)  # agreements
SAMPLED = {"temperature": 0.8, "seed": 0}


@dataclasses.dataclass(frozen=True)
class Own:
    """A model, its text, and prompts of two kinds."""

    config: ModelConfig
    params: Params
    new_tokens: int
    training: Callable[[], Iterable[Batch]]
    held_out: Callable[[], Iterable[Batch]]
    prose: list[list[int]]
    copying: list[list[int]]


def rows(options: Options) -> Iterator[Measurement]:
    """Measures every row of this module.

    Args:
      options: model, data, rounds and seed.

    Raises:
      FileNotFoundError: there is no such model or text.
      ValueError: no model is named, or a lossless row loses a token.
    """
    if not options.model:
        raise ValueError("--model: bench real measures a model of your own; name its folder")
    with tempfile.TemporaryDirectory() as folder:
        yield from _rows(_own(options, Path(folder)), options)


def _own(options: Options, folder: Path) -> Own:
    """The model with its text."""
    decoder, params = load_decoder(options.model)
    config, params = without_exits(decoder.config, params)
    tokenizer = Tokenizer.load(options.model)
    tokenizer.check_vocabulary(config.vocab_size)
    seq_len = min(256, config.max_len // 2)
    data = data_config("test", options.data, folder, seq_len=seq_len, batch_size=4, seed=options.seed)

    def batches(arrays: Iterable[Any]) -> Iterable[Batch]:
        return (Batch(**each) for each in arrays)

    documents = pipeline.documents(data, "test")
    held_out = (documents[i] for i in range(len(documents)))
    texts = (document.text for document in held_out if isinstance(document, Document))  # no chats
    encoded = [ids for text in texts if len(ids := tokenizer.encode(text, bos=True)) >= 64]
    chosen = [encoded[i * len(encoded) // PROMPTS] for i in range(min(PROMPTS, len(encoded)))]
    if not chosen:
        raise ValueError("--data: no held-out piece of text has 64 tokens; give more text")
    prose = [ids[:64] for ids in chosen]
    copying = [planning.repeated(ids) for ids in prose]
    return Own(
        config,
        params,
        _new_tokens(Sampler(Decoder(config), params), prose[0], config.max_len - len(copying[0])),
        lambda: batches(pipeline.train_batches(data, tokenizer)),
        lambda: batches(pipeline.eval_batches(data, tokenizer, "test")),
        prose=prose,
        copying=copying,
    )


def _new_tokens(full: Sampler, prompt: list[int], room: int) -> int:
    """Tokens per call: more of a fast model, whose calls would otherwise be shorter than their jitter."""

    def run() -> None:
        full.sample(prompt, NEW_TOKENS, ignore_eos=True)

    seconds = min(interleave({"full": run}, rounds=2)["full"])
    return max(1, min(room, MOST_TOKENS, math.ceil(NEW_TOKENS * max(1.0, LEAST_SECONDS / seconds))))


def _first_tokens(batches: Iterable[Batch], tokens: int) -> Iterable[Batch]:
    """The first batches, of about so many tokens, but at least 8: previews need some to calibrate on."""
    batches = iter(batches)
    first = next(batches)
    count = max(8, tokens // first.tokens.size)
    return itertools.chain([first], itertools.islice(batches, count - 1))


def _rows(own: Own, options: Options) -> Iterator[Measurement]:
    found = planning.explore(
        own.config,
        own.params,
        (*EXITS, PREVIEW_AGREEMENT),
        fitting=lambda: _first_tokens(own.training(), FIT_TOKENS),
        testing=lambda: _first_tokens(own.held_out(), FIT_TOKENS // 2),
        prompts=own.prose,
        new_tokens=own.new_tokens,
        window=WINDOW,
        say=_say,
    )
    sides = _sides(own, found)
    compared: list[Compared] = []
    yield from _against_llama_cpp(own, sides.full, options.rounds)
    yield from _prose(own, found.plan, sides, options.rounds, compared)
    yield from _lossless(own, found.plan, sides, options.rounds, compared)
    compared += _batch(own, found, sides, options.rounds)

    note = "; ".join(f"{name} {measured:.3f}, {forecast:.3f}" for name, measured, forecast in compared)
    ratios = [measured / forecast for _, measured, forecast in compared]
    worst = max(ratios, key=lambda ratio: abs(np.log(ratio)))
    yield Measurement("real/plan", worst, 1.0, worst, note)


class Compared(NamedTuple):
    """A configuration, and its speed relative to full depth."""

    name: str
    measured: float
    forecast: float


@dataclasses.dataclass(frozen=True)
class Sides:
    """Samplers that are compared with full depth.

    Attributes:
      full: full depth.
      preview: a preview of the head.
      exits: by their configuration in the plan: the best of each agreement, and the earliest of the first.
      lossless: likewise; lookup comes first, and the others draft with the exit of the plan's best drafts.
    """

    full: Sampler
    preview: Sampler
    exits: dict[Configuration, Sampler]
    lossless: dict[Configuration, Sampler]


def _sides(own: Own, found: planning.Explored) -> Sides:
    """The configurations of the plan that are measured."""
    plan, decoder = found.plan, Decoder(own.config)

    def with_exit(configuration: Configuration, **how: Any) -> Sampler:
        assert configuration.layer is not None
        assert configuration.target is not None
        model, params, policy = found.with_exit(configuration.layer, configuration.target)
        return Sampler(model, params, exit=policy, **how)

    early = min(planning.candidate_layers(own.config.n_layers))
    chosen = [*(best_exit(plan, target) for target in EXITS), exit_at(plan, early, EXITS[0])]
    drafts = max((c for c in plan.configurations if c.name == "lossless exits"), key=_speed, default=None)
    both = [c for c in plan.configurations if c.name == "lossless lookup + exits"]
    lookup = next(c for c in plan.configurations if c.name == "lossless lookup")
    lossless = {lookup: Sampler(decoder, own.params, lossless=True, lookup=True)}
    for configuration in [*([drafts] if drafts else []), *both]:
        with_lookup = configuration in both
        lossless[configuration] = with_exit(configuration, lossless=True, lookup=with_lookup)
    return Sides(
        Sampler(decoder, own.params),
        Sampler(decoder, own.params, preview=found.previews[PREVIEW_AGREEMENT]),
        {configuration: with_exit(configuration) for configuration in chosen},
        lossless,
    )


def best_exit(plan: planning.Plan, target: float) -> Configuration:
    """The exit that the plan finds best for a target."""
    return exit_at(plan, next(row.exit_layer for row in plan.targets if row.target == target), target)


def exit_at(plan: planning.Plan, layer: int, target: float) -> Configuration:
    """The configuration with the exit after one layer; of speed 1 where it cannot keep the target."""
    wanted = ("exits", layer, target)
    found = (c for c in plan.configurations if (c.name, c.layer, c.target) == wanted)
    return next(found, Configuration("exits", target, 1.0, layer))


def _prose(
    own: Own, plan: planning.Plan, sides: Sides, rounds: int, compared: list[Compared]
) -> Iterator[Measurement]:
    """Everything that continues prose greedily takes turns, lossless or not; `compared` grows."""
    everyone = {"cheap_head": sides.preview, **_named(sides.exits), **_named(sides.lossless)}
    _say(f"continuing prose: {', '.join(everyone)}")
    speed, tokens = _compare(sides.full, everyone, own.prose, new_tokens=own.new_tokens, rounds=rounds)
    _check(tokens, _named(sides.lossless), "prose")

    equal = np.mean(np.asarray(tokens["full"]) == np.asarray(tokens["cheap_head"]))
    report = plan.previews[PREVIEW_AGREEMENT]
    note = f"{equal:.4f} of the generated tokens equal, {report.agreement:.4f} of given text"
    ideal = next(row.preview for row in plan.targets if row.target == PREVIEW_AGREEMENT)
    compared.append(Compared("preview", speed["cheap_head"], ideal))
    yield Measurement("real/cheap_head", speed["cheap_head"], ideal, speed["cheap_head"] / ideal, note)

    for configuration, name in zip([*sides.exits, *sides.lossless], list(everyone)[1:], strict=True):
        compared.append(Compared(name, speed[name], configuration.speedup))
    for target in EXITS:
        best = best_exit(plan, target)
        measured = speed[_name(best)]
        row, note = f"real/exits_{100 * target:g}", f"after layer {best.layer}"
        yield Measurement(row, measured, best.speedup, measured / best.speedup, note)


def _lossless(
    own: Own, plan: planning.Plan, sides: Sides, rounds: int, compared: list[Compared]
) -> Iterator[Measurement]:
    """Drafts where a text repeats itself, and on sampled prose; `compared` grows."""
    everyone = _named(sides.lossless)
    lookup, *others = everyone
    together = []
    for kind, prompts, settings in (("copy", own.copying, {}), ("prose", own.prose[:2], SAMPLED)):
        _say(f"lossless, {kind}: {', '.join(everyone)}")
        speed, tokens = _compare(
            sides.full, everyone, prompts, new_tokens=own.new_tokens, rounds=rounds, **settings
        )
        _check(tokens, everyone, kind)
        if not settings:
            compared.append(Compared(f"{lookup} of a repeated text", speed[lookup], plan.repeated))
        ideal = 1.0 if settings else plan.repeated
        yield Measurement.of(f"real/lookup_{kind}", speed[lookup], ideal)
        if len(others) == 2:
            exits, both = others
            together.append((speed[both], max(speed[lookup], speed[exits])))
    if together:
        both, better = map(statistics.mean, zip(*together, strict=True))
        yield Measurement.of("real/lookup_and_exits", both, better)


def _against_llama_cpp(own: Own, full: Sampler, rounds: int) -> Iterator[Measurement]:
    """Full depth against llama.cpp, medians over rounds, means over prompts."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = llama_cpp.generator(own.config, own.params, Path(folder) / "model.gguf", usable_cores())
        if theirs is None:
            return

        def ours(prompt: list[int], count: int) -> list[int]:
            return full.sample(prompt, count, ignore_eos=True).tokens

        speeds, equal = [], []
        for prompt in own.prose:
            first, whole = (
                interleave(
                    {
                        "ours": functools.partial(ours, prompt, count),
                        "theirs": functools.partial(theirs, prompt, count),
                    },
                    rounds,
                )
                for count in (1, own.new_tokens)
            )
            each = {name: without_first(whole[name], first[name]) for name in whole}
            speeds.append(
                (
                    np.median((own.new_tokens - 1) / each["ours"]),
                    np.median((own.new_tokens - 1) / each["theirs"]),
                    np.median(each["theirs"] / each["ours"]),
                )
            )
            pairs = zip(ours(prompt, own.new_tokens), theirs(prompt, own.new_tokens), strict=True)
            equal += [a == b for a, b in pairs]

    measured, ideal, ratio = np.mean(speeds, axis=0).tolist()
    half = Workload(context=len(own.prose[0]) + own.new_tokens // 2)
    read = bandwidth_note(own.config, half, 1 / measured, matvec_bandwidth())
    note = f"{np.mean(equal):.4f} of the generated tokens equal; {read}"
    yield Measurement("real/full_vs_llamacpp", measured, ideal, ratio, note)


def _batch(own: Own, found: planning.Explored, sides: Sides, rounds: int) -> list[Compared]:
    """The best exit of the first agreement in a batch, forecast for so many rows."""
    best = best_exit(found.plan, EXITS[0])
    assert best.layer is not None
    if found.thresholds[best.layer, EXITS[0]] >= NEVER_EXITS:
        return []
    _say(f"batches of {BATCH}: {_name(best)}")
    rows = [own.prose[i % len(own.prose)] for i in range(BATCH)]
    forecast = planning.for_batch(found, rows, own.new_tokens, best.layer).exits(best.layer, EXITS[0]).speedup
    speed, _ = _compare(
        sides.full, {"exits": sides.exits[best]}, [rows], new_tokens=own.new_tokens, rounds=rounds
    )
    return [Compared(f"{_name(best)}, batch {BATCH}", speed["exits"], forecast)]


def _name(configuration: Configuration) -> str:
    """A configuration without its forecast."""
    return str(configuration).partition(":")[0]


def _named(samplers: dict[Configuration, Sampler]) -> dict[str, Sampler]:
    return {_name(configuration): sampler for configuration, sampler in samplers.items()}


def _say(what: str) -> None:
    """Progress, beside the rows."""
    print(what, file=sys.stderr, flush=True)


def _speed(configuration: Configuration) -> float:
    return configuration.speedup


def _check(tokens: dict[str, list[Any]], sides: Iterable[str], name: str) -> None:
    for side in sides:
        if tokens[side] != tokens["full"]:
            raise ValueError(f"real/lookup_{name}: {side} differs from full depth")


def without_first(whole: Sequence[float], first: Sequence[float]) -> np.ndarray:
    """Seconds of calls without those of a call for one token, which are mostly prefill.

    A round that another program has held up leaves nothing, and gets the median of the others.

    Args:
      whole: of each round.
      first: of calls for one token.

    Raises:
      ValueError: that leaves nothing in half of the rounds.
    """
    seconds = np.asarray(whole) - np.median(first)
    good = seconds > 0
    if 2 * np.sum(good) <= len(seconds):
        raise ValueError(
            f"a call of {min(whole):.4f} s took no longer than one for a single token, "
            f"{np.median(first):.4f} s: the model is too fast for so busy a machine; wait, or give "
            "more --rounds"
        )
    return np.where(good, seconds, np.median(seconds[good]))


def _compare(
    full: Sampler,
    sides: dict[str, Sampler],
    prompts: list[Any],
    *,
    new_tokens: int,
    rounds: int,
    **settings: Any,
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Speed of each side relative to full depth over all prompts, the median over rounds; and all tokens.

    A prompt may be a batch of them.
    """
    everyone = {"full": full, **sides}
    tokens: dict[str, list[Any]] = {name: [] for name in everyone}
    seconds = {name: np.zeros(rounds) for name in everyone}
    for prompt in prompts:
        found: dict[str, Any] = {}

        def run(name: str, count: int, prompt: Any = prompt, found: Any = found) -> None:
            samples = everyone[name].sample(prompt, count, ignore_eos=True, **settings)
            found[name] = [s.tokens for s in samples] if isinstance(samples, list) else samples.tokens

        first = interleave({name: functools.partial(run, name, 1) for name in everyone}, rounds)
        whole = interleave({name: functools.partial(run, name, new_tokens) for name in everyone}, rounds)
        for name in everyone:
            tokens[name].append(found[name])
            seconds[name] += without_first(whole[name], first[name])
    return {name: float(np.median(seconds["full"] / seconds[name])) for name in sides}, tokens

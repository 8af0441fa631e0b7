"""What each dial gives on a pretrained model of one's own, and what the plan forecast; needs --model.

`elastic-lm bench real --model DIR --data FILES` fits on the first nine tenths of the text and measures on the
rest. Batch 1; the time of a one-token call is taken off; sides take turns.

- real/cheap_head: speed relative to full depth with a preview of the vocabulary head for 99.95 % of the
  tokens; ideal = what the bytes predict. The note says how many generated tokens are those of full depth.
- real/exits_95, real/exits_99: speed relative to full depth with the exit that the plan finds best, fitted in
  closed form, at this agreement; ideal = the plan's forecast.
- real/lookup_copy: lossless decoding with prompt lookup where a text has just been read twice and begins a
  third time, greedy; ideal = tokens per verification / cost of a verification.
- real/lookup_prose: the same where prose is continued at temperature 0.8; ideal = 1, no loss.
- real/lookup_and_exits: lossless decoding with the exit and lookup together on both kinds of prompts;
  ideal = the faster of the two alone.
- real/plan: the worst of measured / forecast over the rows above that have a forecast; ideal = 1.

Lossless rows raise where a token differs from full depth.
"""

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elastic_lm.bench import plan as planning
from elastic_lm.bench.report import Measurement, Options
from elastic_lm.bench.timing import interleave
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.config.decoding import PREVIEW_AGREEMENT, WINDOW
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.data import pipeline
from elastic_lm.data.batch import Batch
from elastic_lm.data.splitting import data_config
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.settings import bucket
from elastic_lm.decode.tick_costs import measured_costs
from elastic_lm.depth.calibration import calibrate
from elastic_lm.depth.fitting import fit_exits
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.exits import attach_exits, without_exits

NEW_TOKENS = 64
PROMPTS = 4  # of each kind
FIT_TOKENS = 16_384  # of a pass over text
EXITS = (0.95, 0.99)  # agreements
SAMPLED = {"temperature": 0.8, "seed": 0}


@dataclasses.dataclass(frozen=True)
class Own:
    """A model, its text, and prompts of two kinds."""

    config: ModelConfig
    params: Params
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
    seq_len = min(256, config.max_len // 2)
    data = data_config("test", options.data, folder, seq_len=seq_len, batch_size=4, seed=options.seed)

    def batches(arrays: Iterable[Any]) -> Iterable[Batch]:
        return (Batch(**each) for each in arrays)

    texts = [pipeline.documents(data, "test")[i].text for i in range(len(pipeline.documents(data, "test")))]
    encoded = [ids for text in texts if len(ids := tokenizer.encode(text, bos=True)) >= 64]
    chosen = [encoded[i * len(encoded) // PROMPTS] for i in range(min(PROMPTS, len(encoded)))]
    if not chosen:
        raise ValueError("--data: no held-out piece of text has 64 tokens; give more text")
    return Own(
        config,
        params,
        lambda: batches(pipeline.train_batches(data, tokenizer)),
        lambda: batches(pipeline.eval_batches(data, tokenizer, "test")),
        prose=[ids[:64] for ids in chosen],
        copying=[[*ids[:64], *ids[:64], *ids[:8]] for ids in chosen],
    )


def _rows(own: Own, options: Options) -> Iterator[Measurement]:
    config, params = own.config, own.params
    plan, previews = planning.make_plan(
        config,
        params,
        (*EXITS, PREVIEW_AGREEMENT),
        fitting=lambda: planning.first_tokens(own.training(), FIT_TOKENS),
        testing=lambda: planning.first_tokens(own.held_out(), FIT_TOKENS // 2),
        prompts=own.prose[:1],
        new_tokens=NEW_TOKENS,
        window=WINDOW,
    )
    forecasts = {row.target: row for row in plan.targets}
    ratios = []

    def sampler(**how: Any) -> Sampler:
        return Sampler(Decoder(config), params, **how)

    full = sampler()
    cheap = sampler(preview=previews[PREVIEW_AGREEMENT])
    speed, tokens = _compare(full, {"cheap": cheap}, own.prose, options.rounds)
    equal = np.mean(
        [
            a == b
            for x, y in zip(tokens["full"], tokens["cheap"], strict=True)
            for a, b in zip(x, y, strict=True)
        ]
    )
    report = plan.previews[PREVIEW_AGREEMENT]
    note = f"{equal:.4f} of the generated tokens equal, {report.agreement:.4f} of given text"
    ideal = forecasts[PREVIEW_AGREEMENT].preview
    ratios.append(speed["cheap"] / ideal)
    yield Measurement("real/cheap_head", speed["cheap"], ideal, speed["cheap"] / ideal, note)

    with_exit, grown, policy = _exit(own, forecasts[EXITS[0]].exit_layer)
    for target in EXITS:
        layer = forecasts[target].exit_layer
        if (layer,) != policy.layers:
            with_exit, grown, policy = _exit(own, layer)
        early = Sampler(with_exit, grown, exit=policy.at(target))
        speed, _ = _compare(full, {"exits": early}, own.prose, options.rounds)
        ideal = forecasts[target].exits
        ratios.append(speed["exits"] / ideal)
        name = f"real/exits_{100 * target:g}"
        yield Measurement(name, speed["exits"], ideal, speed["exits"] / ideal, f"after layer {layer}")

    exits = {"exit": policy.at(EXITS[0]), "lossless": True}
    sides = {
        "lookup": sampler(lossless=True, lookup=True),
        "exits": Sampler(with_exit, grown, **exits),
        "both": Sampler(with_exit, grown, lookup=True, **exits),
    }
    together = []
    for name, prompts, settings in (("copy", own.copying, {}), ("prose", own.prose, SAMPLED)):
        speed, tokens = _compare(full, sides, prompts, options.rounds, **settings)
        for side in sides:
            if tokens[side] != tokens["full"]:
                raise ValueError(f"real/lookup_{name}: {side} differs from full depth")
        ideal = 1.0
        if name == "copy":
            ideal = _lookup_forecast(sides["lookup"], prompts, config)
            ratios.append(speed["lookup"] / ideal)
        yield Measurement.of(f"real/lookup_{name}", speed["lookup"], ideal)
        together.append((speed["both"], max(speed["lookup"], speed["exits"])))
    both, better = map(statistics.mean, zip(*together, strict=True))
    yield Measurement.of("real/lookup_and_exits", both, better)

    worst = max(ratios, key=lambda ratio: abs(np.log(ratio)))
    yield Measurement.of("real/plan", worst, 1.0)


def _exit(own: Own, layer: int) -> tuple[Decoder, Params, ConfidenceExit]:
    """The model with one exit, fitted in closed form and calibrated."""
    exit_config = ExitConfig(layer, "linear", tied=True, init="fit")
    config, params = attach_exits(own.config, own.params, [exit_config], jax.random.key(0))
    params = fit_exits(config, params, planning.first_tokens(own.training(), FIT_TOKENS))
    held_out = planning.first_tokens(own.held_out(), FIT_TOKENS // 2)
    policy = calibrate(config, params, held_out, target=EXITS[0], targets=EXITS)
    return Decoder(config), params, policy


def _compare(
    full: Sampler, sides: dict[str, Sampler], prompts: list[list[int]], rounds: int, **settings: Any
) -> tuple[dict[str, float], dict[str, list[list[int]]]]:
    """Speed of each side relative to full depth, the median over rounds and prompts, and all tokens."""
    everyone = {"full": full, **sides}
    tokens: dict[str, list[list[int]]] = {name: [] for name in everyone}
    ratios: dict[str, list[float]] = {name: [] for name in sides}
    for prompt in prompts:
        found: dict[str, list[int]] = {}

        def run(name: str, count: int, prompt: list[int] = prompt, found: Any = found) -> None:
            found[name] = everyone[name].sample(prompt, count, ignore_eos=True, **settings).tokens

        first = interleave({name: functools.partial(run, name, 1) for name in everyone}, rounds)
        whole = interleave({name: functools.partial(run, name, NEW_TOKENS) for name in everyone}, rounds)
        own = {name: np.asarray(whole[name]) - np.median(first[name]) for name in everyone}
        for name in everyone:
            tokens[name].append(found[name])
        for name in sides:
            ratios[name].append(float(np.median(own["full"] / own[name])))
    return {name: statistics.mean(values) for name, values in ratios.items()}, tokens


def _lookup_forecast(sampler: Sampler, prompts: list[list[int]], config: ModelConfig) -> float:
    """Tokens per verification over what a verification costs, mean over prompts."""
    found = []
    for prompt in prompts:
        stats = sampler.sample(prompt, NEW_TOKENS, ignore_eos=True).stats
        capacity = bucket(len(prompt) + NEW_TOKENS + WINDOW)
        costs = measured_costs(config, sampler.params, batch=1, capacity=capacity, greedy=True, window=WINDOW)
        cost = costs[min(round(stats.drafted / stats.verifications), WINDOW - 1)] / costs[0]
        found.append(stats.tokens / stats.verifications / cost)
    return statistics.mean(found)

"""What early exits, gates and drafts gain and cost; rows of `elastic-lm bench decode`.

On the 12-layer Llama of `bench.decode` with four exits (after layers 2, 4, 6 and 8), batch 1:

- decode/gated_exits_never: speed relative to the plain model when every exit's gate is evaluated and none
  lets its vocabulary head be read; ideal = 1.
- decode/gate_vs_head: milliseconds that one exit check adds per token with a gate that stays shut;
  ideal = the same with the head read and no gates in the model. Smaller is better.

On the embedded model with one exit after a quarter of its layers, tuned here for a minute:

- decode/lossless_embedded: speed relative to full depth of drafting with the exit and verifying with the
  full model, batch 1; ideal = 1 (no gain), and every token equals full depth's.
- decode/batch8_per_row_vs_full: tokens/s of eight rows that leave early one by one; ideal = full depth.
- decode/batch8_per_row_vs_wait_for_all: the same; ideal = rows that leave only all at once (CALM).

With --model, a checkpoint with exits:

- decode/lossless_english: as lossless_embedded, on that model. Named so because the recorded numbers are of
  an English base, `--config english:FOLDER,drafting`.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elastic_lm.bench.report import Measurement, Options
from elastic_lm.bench.timing import interleave
from elastic_lm.checkpoints.embedded import embedded_model
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.config.data import DataConfig
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.data import pipeline
from elastic_lm.data.batch import Batch
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.calibration import calibrate
from elastic_lm.depth.ee_tuning import EETuningConfig
from elastic_lm.depth.policies import ConfidenceExit, ExitPolicy
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.exits import without_exits
from elastic_lm.models.registry import init_params
from elastic_lm.train.config import RunConfig, TrainConfig
from elastic_lm.train.run import MODEL_FOLDER, fit

GATE = 32  # hidden width of the gates
SHUT = 2.0  # a gate's threshold that nothing reaches
LOOKED_AT = 1.0  # a confidence that random weights never reach, but that has the head read
DRAFTING = ("margin", 0.15)  # confidence from which on a draft goes on
BATCH = 8
TARGET = 0.98  # agreement with the full model of the batch-8 rows
OWN_TOKENS = 128  # new tokens per prompt on a checkpoint of the user's own
OPENINGS = (
    "Once upon a time, there was a little girl named",
    "One day, a boy went to the park with his mom.",
    "The cat was sad because it",
    "Tom and his friend wanted to play a game.",
)

OwnModel = tuple[ModelConfig, Params, list[list[int]]]  # with token ids of the prompts


def gate_rows(config: ModelConfig, options: Options, prompt: list[int], new_tokens: int) -> list[Measurement]:
    """What four exits cost that are never taken, with and without gates.

    Args:
      config: a model without exits, of at least two layers.
      options: rounds and seed.
      prompt: token ids.
      new_tokens: to emit per call, at least 2.

    Returns:
      The rows gated_exits_never and gate_vs_head.
    """
    count = 4 if config.n_layers >= 8 else config.n_layers - 1
    layers = tuple(2 * (i + 1) for i in range(4)) if count == 4 else tuple(range(1, count + 1))
    gated = config.with_exits(tuple(ExitConfig(n, "norm", tied=True, gate=GATE) for n in layers))
    params = init_params(gated, jax.random.key(options.seed))
    _, plain = without_exits(gated, params)
    bare = config.with_exits(tuple(dataclasses.replace(e, gate=0) for e in gated.exits))
    gateless = {**params, **{e.name: {"norm": params[e.name]["norm"]} for e in gated.exits}}
    thresholds = (LOOKED_AT,) * count

    def side(model: ModelConfig, weights: Params, policy: ExitPolicy | None, tokens: int = new_tokens):
        sampler = Sampler(Decoder(model), weights, exit=policy)
        return lambda: sampler.sample(prompt, tokens).tokens

    sides = {
        "first": side(config, plain, None, 1),
        "plain": side(config, plain, None),
        "gated": side(gated, params, ConfidenceExit("max_prob", thresholds, layers, gates=(SHUT,) * count)),
        "heads": side(bare, gateless, ConfidenceExit("max_prob", thresholds, layers)),
    }
    seconds = {name: np.asarray(times) for name, times in interleave(sides, options.rounds).items()}
    first = float(np.median(seconds["first"]))
    own = {name: times - first for name, times in seconds.items() if name != "first"}
    milliseconds = {
        name: float(np.median(own[name] - own["plain"])) / (count * (new_tokens - 1)) * 1e3
        for name in ("gated", "heads")
    }
    return [
        Measurement.of("decode/gated_exits_never", float(np.median(own["plain"] / own["gated"])), 1.0),
        Measurement.of("decode/gate_vs_head", milliseconds["gated"], milliseconds["heads"]),
    ]


def embedded_rows(options: Options) -> Iterator[Measurement]:
    """Drafts and batches on the embedded model, with an exit that is tuned first.

    Args:
      options: rounds and seed; tiny = a random model instead.

    Returns:
      The rows lossless_embedded, batch8_per_row_vs_full and batch8_per_row_vs_wait_for_all.

    Raises:
      ValueError: a drafted token differs from full depth's.
    """
    tokens, rounds = (8, 1) if options.tiny else (128, options.rounds)
    tokenizer = Tokenizer.load(embedded_model())
    if options.tiny:
        config = ModelConfig(
            tokenizer.vocab_size, d_model=32, n_layers=3, n_heads=4, d_mlp=64, exits=(ExitConfig(1, "norm"),)
        )
        params = init_params(config, jax.random.key(options.seed))
    else:
        with tempfile.TemporaryDirectory() as folder:
            config, params = _tuned(Path(folder))
    prompts = _prompts(tokenizer, BATCH)
    yield _lossless("decode/lossless_embedded", config, params, prompts, tokens=tokens, rounds=rounds)
    yield from _batches(config, params, tokenizer, prompts, tokens=tokens, rounds=rounds)


def own_model(folder: str) -> OwnModel:
    """A checkpoint of the user's own, and what it is to continue.

    Args:
      folder: of the checkpoint, with its tokenizer.

    Returns:
      (config, canonical parameters, token ids of the prompts).

    Raises:
      FileNotFoundError: the folder, or a file in it, does not exist.
      ValueError: it cannot be read, has no exits, or is too short for the prompts.
    """
    model, params = load_decoder(folder)
    if not model.config.exits:
        raise ValueError(f"--model {folder}: has no exits to draft with; attach and tune them first")
    tokenizer = Tokenizer.load(folder)
    prompts = [tokenizer.encode(text, bos=True) for text in OPENINGS]
    needed = max(map(len, prompts)) + OWN_TOKENS
    if needed > model.config.max_len:
        raise ValueError(
            f"--model {folder}: max_len={model.config.max_len} is below the {needed} tokens of a "
            "measurement; choose a model with a longer context"
        )
    return model.config, params, prompts


def model_row(own: OwnModel, options: Options) -> Measurement:
    """Drafts on a checkpoint of the user's own.

    Args:
      own: from `own_model`.
      options: rounds.

    Returns:
      The row lossless_english.

    Raises:
      ValueError: a token differs from full depth's.
    """
    return _lossless("decode/lossless_english", *own, tokens=OWN_TOKENS, rounds=options.rounds)


def _tuned(folder: Path, steps: int = 60) -> tuple[ModelConfig, Params]:
    """The embedded model with an exit after a quarter of its layers."""
    base = load_decoder(embedded_model())[0].config
    run = RunConfig(
        exits=(ExitConfig(max(1, base.n_layers // 4), "norm"),),
        data=DataConfig(source="stdlib", seq_len=256, batch_size=16),
        method=EETuningConfig(),
        train=TrainConfig(
            init_from=str(embedded_model()),
            steps=steps,
            lr=1e-3,
            warmup=1,
            weight_decay=0.0,
            eval_every=0,
            eval_batches=1,
            save_every=steps,
        ),
    )
    fit(run, folder)
    model, params = load_decoder(folder / MODEL_FOLDER)
    return model.config, params


def _prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Beginnings of held-out rows of the standard library."""
    data = DataConfig(source="stdlib", seq_len=256, batch_size=count)
    rows = next(iter(pipeline.eval_batches(data, tokenizer, "test")))["tokens"]
    return [row[:32].tolist() for row in np.asarray(rows)]


def _plain(config: ModelConfig, params: Params) -> Sampler:
    plain, backbone = without_exits(config, params)
    return Sampler(Decoder(plain), backbone)


def _each(sampler: Sampler, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    return [sampler.sample(prompt, tokens, ignore_eos=True).tokens for prompt in prompts]


def _lossless(
    name: str, config: ModelConfig, params: Params, prompts: list[list[int]], *, tokens: int, rounds: int
) -> Measurement:
    """Speed of drafting and verifying against full depth, one prompt after the other.

    Raises:
      ValueError: a token differs from full depth's; names prompt, position and both tokens.
    """
    metric, threshold = DRAFTING
    layers = tuple(e.layer for e in config.exits)
    policy = ConfidenceExit(metric, (threshold,) * len(layers), layers)
    full = _plain(config, params)
    drafting = Sampler(Decoder(config), params, exit=policy, window=4, lossless=True)
    pairs = zip(_each(full, prompts, tokens), _each(drafting, prompts, tokens), strict=True)
    for number, (wanted, given) in enumerate(pairs):
        if wanted != given:
            place = next(i for i, (a, b) in enumerate(zip(wanted, given, strict=True)) if a != b)
            raise ValueError(
                f"{name}: new token {place} of prompt {number} is {given[place]} when drafted, but "
                f"{wanted[place]} at full depth; run a float32 model, where both round alike, or report this"
            )
    sides = {
        "full": lambda: _each(full, prompts, tokens) and None,
        "lossless": lambda: _each(drafting, prompts, tokens) and None,
    }
    seconds = interleave(sides, rounds)
    return Measurement.of(
        name, float(np.median(np.asarray(seconds["full"]) / np.asarray(seconds["lossless"]))), 1.0
    )


def _batches(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    *,
    tokens: int,
    rounds: int,
) -> list[Measurement]:
    """Throughput of eight rows: each on its own, all at once, and at full depth."""
    data = DataConfig(source="stdlib", seq_len=256, batch_size=8)
    held_out = itertools.islice(
        pipeline.eval_batches(data, tokenizer, "calibration"), 2 if tokens < 16 else 10
    )
    batches = (Batch(**arrays) for arrays in held_out)
    policy = calibrate(config, params, batches, target=TARGET, metric="margin")

    def side(sampler: Sampler) -> Callable[[], Any]:
        return lambda: sampler.sample(prompts, tokens, ignore_eos=True) and None

    sides = {
        "full": side(_plain(config, params)),
        "per_row": side(Sampler(Decoder(config), params, exit=policy)),
        "together": side(Sampler(Decoder(config), params, exit=policy, together=True)),
    }
    seconds = interleave(sides, rounds)
    speed = {name: float(np.median(len(prompts) * tokens / np.asarray(s))) for name, s in seconds.items()}
    pairs = (("decode/batch8_per_row_vs_full", "full"), ("decode/batch8_per_row_vs_wait_for_all", "together"))
    return [
        Measurement(
            name,
            speed["per_row"],
            speed[other],
            float(np.median(np.asarray(seconds[other]) / np.asarray(seconds["per_row"]))),
        )
        for name, other in pairs
    ]

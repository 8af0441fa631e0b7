"""Batch-1 greedy decoding against transformers, memory bandwidth and what skipped bytes predict.

Rows, on a 12-layer Llama (d 768, vocabulary 32000, float32, random weights), 128 new tokens a call; all
but the first without the time of a one-token call, which is mostly prefill:

- decode/full_vs_transformers: tokens/s of the full model; ideal = transformers' `generate` on the same
  weights, dtype and threads, prefill included; measured apart from the other rows, where
  torch's pool of threads might disturb its neighbours. Skipped, with a line, where torch is not installed.
- decode/full_vs_bandwidth: bytes/s of weights read by the full model; ideal = what one large float32
  matrix-vector product reaches in this process. The note says the tokens/s, and the bytes with the caches'.
- decode/exits_never: speed relative to the plain model with an exit after layer 6 that is looked at but
  never taken; ideal = bytes of the plain model / (the same + one more vocabulary head per token).
- decode/exit_half: speed relative to the plain model with the exit always taken; ideal = bytes of the
  plain model / (lower half + head per token + upper half once per window).
- decode/compilations: programs compiled over prompts of several buckets, thresholds, metrics and sampling
  settings; ideal = number of buckets of prefill and of decoding.

Then the rows of `bench.early`: gates, drafts, batches.
"""

import dataclasses
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elastic_lm.bench import early
from elastic_lm.bench.model import random_model
from elastic_lm.bench.report import Measurement, Options
from elastic_lm.bench.timing import bandwidth_note, interleave, matvec_bandwidth
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.cost.counted import Workload
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.settings import bucket
from elastic_lm.depth.confidence import METRICS
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.hf import export
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.exits import without_exits
from elastic_lm.models.registry import init_params
from elastic_lm.report.machine import usable_cores

WINDOW = 32
PROMPT = 16  # tokens


def rows(options: Options) -> Iterator[Measurement]:
    """Measures every row of this module and of `bench.early`.

    Args:
      options: size, rounds, seed, and a checkpoint with exits or "".

    Returns:
      One row per line of the lists there and above, each as soon as it is measured. What lossless decoding
      loses is raised there, the rest at once.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: the checkpoint cannot be measured, or lossless decoding loses a token.
    """
    own = early.own_model(options.model) if options.model else None  # refused before anything is timed
    return _rows(own, options)


def _rows(own: early.OwnModel | None, options: Options) -> Iterator[Measurement]:
    config, new_tokens = random_model(options.tiny), 64 if options.tiny else 128
    half = config.n_layers // 2
    exits = config.with_exits((ExitConfig(half, "norm", tied=True),))
    params = init_params(exits, jax.random.key(options.seed))
    _, plain = without_exits(exits, params)
    prompt = np.random.default_rng(options.seed).integers(3, config.vocab_size, PROMPT).tolist()

    def side(
        model: ModelConfig, weights: Params, *thresholds: float, tokens: int = new_tokens
    ) -> Callable[[], Any]:
        policy = ConfidenceExit("max_prob", thresholds, (half,)) if thresholds else None
        sampler = Sampler(Decoder(model), weights, exit=policy, window=WINDOW)
        return lambda: sampler.sample(prompt, tokens).tokens

    bandwidth: list[float] = []
    sides = {
        "first": side(config, plain, tokens=1),
        "plain": side(config, plain),
        "never": side(exits, params, early.LOOKED_AT),
        "half": side(exits, params, 0.0),
        "bandwidth": lambda: bandwidth.append(matvec_bandwidth(16 if options.tiny else 256)),
    }
    seconds = interleave(sides, options.rounds)
    yield from _compare(config, plain, seconds, bandwidth, new_tokens)
    reference = _transformers(config, plain, prompt, new_tokens)
    if reference is not None:
        ours_theirs = {"plain": sides["plain"], "transformers": reference}
        yield _against(interleave(ours_theirs, options.rounds), new_tokens)
    yield _compilations(exits, params, half)
    yield from early.gate_rows(config, options, prompt, new_tokens)
    yield from early.embedded_rows(options)
    if own:
        yield early.model_row(own, options)


def layer_bytes(params: Params, layers: Sequence[int]) -> int:
    """Bytes of the weights of these layers."""
    return sum(x.nbytes for i in layers for x in jax.tree.leaves(params[f"layers_{i}"]))


def _compare(
    config: ModelConfig,
    params: Params,
    seconds: dict[str, list[float]],
    bandwidth: list[float],
    new_tokens: int,
) -> list[Measurement]:
    """Rows from interleaved timings; every ratio is formed within a round, then the median is taken.

    The time of a call for one token, most of it prefill, is taken off: bytes predict what a token costs.
    """
    half = config.n_layers // 2
    lower = layer_bytes(params, range(half))
    upper = layer_bytes(params, range(half, config.n_layers))
    head = params["head"]["kernel"].nbytes
    full = lower + upper + head
    first = float(np.median(seconds["first"]))
    plain = np.asarray(seconds["plain"]) - first

    def speed(name: str) -> float:
        return float(np.median(plain / (np.asarray(seconds[name]) - first)))

    reached = full * (new_tokens - 1) / plain
    a_token, copied = float(np.median(plain)) / (new_tokens - 1), float(np.median(bandwidth[1:]))
    read = bandwidth_note(config, Workload(context=PROMPT + new_tokens // 2), a_token, copied)
    note = f"{1 / a_token:.1f} tokens/s, {read}"
    with_bandwidth = Measurement.of("decode/full_vs_bandwidth", float(np.median(reached)), copied)
    return [
        dataclasses.replace(with_bandwidth, note=note),
        Measurement.of("decode/exits_never", speed("never"), full / (full + head)),
        Measurement.of("decode/exit_half", speed("half"), full / (lower + head + upper / WINDOW)),
    ]


def _against(seconds: dict[str, list[float]], new_tokens: int) -> Measurement:
    """The full model's tokens/s against transformers', prefill included on both sides."""
    plain, theirs = np.asarray(seconds["plain"]), np.asarray(seconds["transformers"])
    return Measurement(
        "decode/full_vs_transformers",
        float(np.median(new_tokens / plain)),
        float(np.median(new_tokens / theirs)),
        float(np.median(theirs / plain)),
    )


def _transformers(
    config: ModelConfig, params: Params, prompt: list[int], new_tokens: int
) -> Callable[[], Any] | None:
    """transformers' greedy `generate` on the same weights, or None where it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        print(
            "torch or transformers is not installed: decode/full_vs_transformers is left out", file=sys.stderr
        )
        return None
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as folder:
        export(config, params, Path(folder) / "model")
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
    ids = torch.tensor([prompt])

    def generate() -> Any:
        with torch.inference_mode():
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
            ).tolist()

    return generate


def _compilations(config: ModelConfig, params: Params, half: int) -> Measurement:
    """Counts programs while everything that is traced changes."""
    rng, new_tokens = np.random.default_rng(0), 4
    lengths = (3, 20, 40, 60)
    before = Sampler.compilations()
    for length in lengths:
        for metric, threshold in zip(METRICS[:3], (0.0, 0.5, 2.0), strict=True):
            policy = ConfidenceExit(metric, (threshold,), (half,))
            sampler = Sampler(Decoder(config), params, exit=policy, window=WINDOW - 1)
            prompt = rng.integers(3, config.vocab_size, length).tolist()
            sampler.sample(prompt, new_tokens, temperature=threshold, top_k=length, seed=length)
    prefills = {(bucket(n), bucket(n + new_tokens + WINDOW - 1)) for n in lengths}
    loops = {bucket(n + new_tokens + WINDOW - 1) for n in lengths}
    return Measurement.of(
        "decode/compilations", Sampler.compilations() - before, float(len(prefills) + len(loops))
    )

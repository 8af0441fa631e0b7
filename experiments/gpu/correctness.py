"""Logits against the CPU's in float32, and tokens that must not depend on how they are computed."""

import argparse
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import Record

import elastic_lm as el
from elastic_lm.bench.model import random_model
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.depth.confidence import confidence
from elastic_lm.models.decoder import Output, Params
from elastic_lm.models.registry import init_params

SHAPE = (2, 64)  # rows and tokens of the compared logits
PROMPTS, NEW = 16, 64
WINDOW = 3
METRIC = "max_prob"

Rows = list[list[int]]


def logits(record: Record, args: argparse.Namespace) -> None:
    """Relative errors of logits, per model and arithmetic."""
    models = {"random": random(args.tiny), "embedded": embedded(args.tiny)}
    for name, (config, params) in models.items():
        tokens = np.random.default_rng(0).integers(3, config.vocab_size, SHAPE, np.int32)
        reference = on_cpu(lambda p, c=config, t=tokens: forward(c)(p, t).logits, params)
        half = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        found = {}
        for label, model, weights, precision in (
            ("tf32", config, params, "default"),
            ("float32", config, params, "highest"),
            ("bfloat16", half, rounded, "default"),
        ):
            with jax.default_matmul_precision(precision):
                out = np.asarray(forward(model)(weights, tokens).logits)
            found[label] = compared(out, reference)
        record.put(**{name: found})


def invariants(record: Record, precision: str, args: argparse.Namespace) -> None:
    """Rows of tokens that differ where none should."""
    config, params = with_exit(*embedded(args.tiny))
    plain, backbone = el.depth.without_exits(config, params)
    prompts, new = read_prompts(), 8 if args.tiny else NEW
    layer = config.exits[0].layer

    def policy(threshold: float) -> el.ConfidenceExit:
        return el.ConfidenceExit(METRIC, (threshold,), (layer,))

    def greedy(model: el.ModelConfig, weights: Params, rows: Sequence[list[int]], **how: Any) -> list[Any]:
        return el.Sampler(el.Decoder(model), weights, window=WINDOW, **how).sample(
            list(rows), new, ignore_eos=True
        )

    def tokens(samples: list[Any]) -> Rows:
        return [sample.tokens for sample in samples]

    threshold = middle_confidence(config, params, prompts)
    host = tokens(on_cpu(lambda p: greedy(plain, p, prompts), backbone))
    record.say("the CPU's tokens are there")
    with jax.default_matmul_precision(precision):
        full = tokens(greedy(plain, backbone, prompts))
        found = differing(host, full)
        record.put(rows=len(prompts), new_tokens=new, threshold=threshold, gpu_vs_cpu=found)
        record.put(gap_of_logits_where_gpu_and_cpu_part=gaps(plain, backbone, prompts, host, full))
        batch = greedy(config, params, prompts, exit=policy(threshold))
        early = float(np.mean([d < config.n_layers for s in batch for d in s.exit_layers]))
        alone = [greedy(config, params, [prompt], exit=policy(threshold))[0] for prompt in prompts]
        depths = sum(a.exit_layers != b.exit_layers for a, b in zip(alone, batch, strict=True))
        record.put(share_of_early_tokens=early, batch_vs_alone=differing(tokens(alone), tokens(batch)))
        waiting = greedy(config, params, prompts, exit=policy(threshold), fire_share=1.0)
        found = differing(tokens(alone), tokens(waiting))
        record.put(batch_vs_alone_rows_of_other_depths=depths, batch_that_waits_vs_alone=found)
        never = tokens(greedy(config, params, prompts, exit=policy(2.0)))
        record.put(exit_never_vs_plain=differing(full, never))
        for name, least in (("all", 0.0), ("confident", threshold)):
            drafted = greedy(config, params, prompts, exit=policy(least), lossless=True, fire_share=1.0)
            stats, rows = drafted[0].stats, tokens(drafted)
            found = differing(full, rows) | {"drafted": stats.drafted, "accepted": stats.accepted}
            found["gap"] = gaps(plain, backbone, prompts, full, rows)
            record.put(**{f"lossless_vs_plain_draft_{name}": found})


def random(tiny: bool) -> tuple[el.ModelConfig, Params]:
    """The 12-layer Llama of the benchmarks."""
    config = random_model(tiny)
    return config, init_params(config, jax.random.key(0))


def embedded(tiny: bool) -> tuple[el.ModelConfig, Params]:
    """The embedded model in float32; of a tiny run its first layers."""
    model, params = load_decoder(el.embedded_model(), dtype="float32")
    config, params = model.config, jax.device_put(params, jax.devices()[0])
    if not tiny:
        return config, params
    above = {f"layers_{i}" for i in range(2, config.n_layers)}
    return config.with_layers(range(2)), {name: tree for name, tree in params.items() if name not in above}


def with_exit(config: el.ModelConfig, params: Params) -> tuple[el.ModelConfig, Params]:
    """An untrained exit after half the layers, through the model's own norm and head."""
    exits = (el.ExitConfig(config.n_layers // 2, "norm", tied=True),)
    return el.attach_exits(config, params, exits, jax.random.key(1))


def read_prompts() -> Rows:
    """Beginnings of Python code, of 5 to 32 tokens, so that all fit one bucket."""
    ids = el.Tokenizer.load(el.embedded_model()).encode(inspect.getsource(json.decoder))
    lengths = np.random.default_rng(0).integers(5, 33, PROMPTS)
    return [ids[100 * i : 100 * i + n] for i, n in enumerate(lengths)]


def on_cpu(function: Callable[[Params], Any], params: Params) -> Any:
    """What a function of the parameters gives on the host, in numpy where it is an array."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        found = function(jax.device_put(params, cpu))
    return np.asarray(found) if isinstance(found, jax.Array) else found


@functools.cache
def forward(config: el.ModelConfig) -> Callable[..., Output]:
    """A jitted forward pass."""

    def apply(params: Params, tokens_BT: jax.Array) -> Any:
        return el.Decoder(config).apply({"params": params}, tokens_BT)

    return jax.jit(apply)


def compared(out: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Relative error, and the share of positions with the same best token."""
    error = np.linalg.norm(out.astype(float) - reference) / np.linalg.norm(reference.astype(float))
    return {"error": float(error), "same_best": float(np.mean(out.argmax(-1) == reference.argmax(-1)))}


def middle_confidence(config: el.ModelConfig, params: Params, prompts: Rows) -> float:
    """A threshold that about half of the prompts' positions reach, so that exits fire and do not."""
    width = min(map(len, prompts))
    tokens = np.asarray([row[:width] for row in prompts], np.int32)

    def confidences(host: Params) -> jax.Array:
        return confidence(METRIC, forward(config)(host, tokens).exit_logits[0])

    return float(np.median(on_cpu(confidences, params)))


def differing(wanted: Rows, given: Rows) -> dict[str, Any]:
    """Rows that differ, and where each of them first does."""
    places = [parting(a, b) for a, b in zip(wanted, given, strict=True)]
    places = [place for place in places if place is not None]
    return {"differing_rows": len(places), "first": places}


def parting(wanted: list[int], given: list[int]) -> int | None:
    """The first place where two rows differ."""
    if len(wanted) != len(given):
        return min(len(wanted), len(given))
    return next((i for i, (a, b) in enumerate(zip(wanted, given, strict=True)) if a != b), None)


def gaps(config: el.ModelConfig, params: Params, prompts: Rows, wanted: Rows, given: Rows) -> list[float]:
    """How far apart the two tokens' logits are where two full-depth rows part, in float32 on the CPU.

    A gap near zero is a tie that arithmetic rounds one way or the other; a large one is an error.
    """
    found, length = [], max(len(p) + len(w) for p, w in zip(prompts, wanted, strict=True))
    for prompt, row, other in zip(prompts, wanted, given, strict=True):
        place = parting(row, other)
        if place is None or place >= min(len(row), len(other)):
            continue
        tokens = np.zeros((1, length), np.int32)  # what follows a position does not reach it
        tokens[0, : len(prompt) + len(row)] = prompt + row
        logits = on_cpu(lambda p, t=tokens: forward(config)(p, t).logits, params)
        last = logits[0, len(prompt) + place - 1]
        found.append(float(last[row[place]] - last[other[place]]))
    return found

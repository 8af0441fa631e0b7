"""One optimizer step of three methods, by the step function of `elastic-lm bench train`."""

import argparse
from typing import Any

import decoding
import jax
import jax.numpy as jnp
import numpy as np
from record import Record

import elastic_lm as el
from elastic_lm.bench.timing import interleave
from elastic_lm.bench.train import SUB_MODELS, random_batch, random_params, timed_step
from elastic_lm.models.decoder import Params


def training(record: Record, args: argparse.Namespace) -> None:
    """Seconds, tokens/s, bytes and the share of the bfloat16 ceiling per method."""
    decoding.big_model.cache_clear()  # its memory is needed here
    config, shape = model(args.tiny)
    layers = config.n_layers
    exits = config.with_exits(tuple(el.ExitConfig(max(1, layers * i // 4)) for i in (1, 2, 3)))
    batch, params = random_batch(config, shape, 0), random_params(exits, 0)
    record.put(
        parameters=decoding.count(el.depth.without_exits(exits, params)[1]), rows=shape[0], length=shape[1]
    )
    sides = {}
    for name in ("sft", "ee_tuning", "soft8"):
        for remat in (False, True):  # True only where the first does not fit
            try:
                sides[name] = side(record, name, exits, params, batch, remat)
                break
            except Exception as error:  # one method that fails leaves the others
                record.put(**{f"{name}_error_remat_{remat}": str(error)[:500]})
    report(record, config, interleave(sides, args.rounds), shape)


def side(record: Record, name: str, exits: el.ModelConfig, params: Params, batch: Any, remat: bool) -> Any:
    """A compiled step of one method that has run once."""
    plain, backbone = el.depth.without_exits(exits, params)
    depths = sub_models(plain.n_layers)
    methods: dict[str, tuple[el.train.Method[Any], Params]] = {
        "sft": (el.train.Pretraining(plain, remat=remat), backbone),
        "ee_tuning": (el.depth.EETuning(exits, remat=remat), params),
        "soft8": (el.depth.SortedFineTuning(plain, depths=depths, remat=remat), backbone),
    }
    method, weights = methods[name]
    run, memory = timed_step(method, jax.tree.map(jnp.copy, weights), batch)
    _, metrics = jax.block_until_ready(run())
    record.put(**{name: {"remat": remat, "bytes": memory, "loss": float(metrics["loss"])}})
    return run


def report(
    record: Record, config: el.ModelConfig, seconds: dict[str, list[float]], shape: tuple[int, int]
) -> None:
    """Speeds and ratios; those to SFT are formed within a round."""
    tokens, ceiling = shape[0] * shape[1], record.found("ceilings").get("matmul_bf16_tflops", float("nan"))
    record.put(seconds_per_step=seconds)
    for name, times in seconds.items():
        step, work = float(np.median(times)), tokens * flops(name, config, shape[1])
        found = {
            **record.found("training")[name],
            "ms": 1e3 * step,
            "tokens_per_s": tokens / step,
            "tflops": work / step / 1e12,
            "of_matmul_ceiling": work / step / 1e12 / ceiling,
        }
        if "sft" in seconds:
            found["against_sft"] = float(np.median(np.asarray(times) / np.asarray(seconds["sft"])))
        record.put(**{name: found})


def model(tiny: bool) -> tuple[el.ModelConfig, tuple[int, int]]:
    """A Llama of 374 million float32 parameters that computes in bfloat16; rows and length of a batch."""
    sizes: dict[str, Any] = {"d_model": 1024, "n_layers": 24, "n_heads": 16, "d_mlp": 2816, "max_len": 1024}
    if tiny:
        sizes = {"d_model": 32, "n_layers": 4, "n_heads": 2, "d_mlp": 64, "max_len": 32}
    vocab = 128 if tiny else 32000
    return el.ModelConfig(vocab_size=vocab, dtype="bfloat16", **sizes), (2, 32) if tiny else (8, 1024)


def sub_models(layers: int) -> tuple[int, ...]:
    """Depths of the nested sub-models, as in `elastic-lm bench train`."""
    count = min(SUB_MODELS, layers)
    return tuple(layers * (i + 1) // count for i in range(count))


def flops(name: str, config: el.ModelConfig, length: int) -> float:
    """Operations per token: 2 per weight and direction, attention over the whole length, nothing twice.

    What trains costs three times its forward pass. The frozen layers of EE-tuning run forward up to the
    deepest exit; each exit is an MLP and a vocabulary head.
    """
    d, inner, width = config.d_model, config.n_heads * config.head_dim, 3 * config.d_model * config.d_mlp
    layer = 2 * (4 * d * inner + width) + 4 * length * inner
    head, n = 2 * config.vocab_size * d, config.n_layers
    if name == "ee_tuning":
        return layer * (n * 3 // 4) + 3 * 3 * (2 * width + head)
    return 3 * (n * layer + head * (len(sub_models(n)) if name == "soft8" else 1))

"""Greedy decoding of a Llama of 1.1 billion bfloat16 weights against what its bytes predict."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from record import Record

import elastic_lm as el
from elastic_lm.bench.timing import interleave
from elastic_lm.decode.settings import bucket
from elastic_lm.models.decoder import Params
from elastic_lm.models.registry import init_params

WINDOW = 32
PROMPT = 96  # with one new token or with all of them and a window, the same bucket: nothing compiles twice
NEW = 128
NEVER_EXITS, ALWAYS = 1.0, 0.0  # thresholds: random weights are never certain, but have their head read


@dataclasses.dataclass(frozen=True)
class Big:
    """The model that is decoded, with an exit at half depth and without."""

    exits: el.ModelConfig
    params: Params
    plain: el.ModelConfig
    backbone: Params


@functools.cache
def big_model(tiny: bool) -> Big:
    """Random weights; every value, cache entry and activation is bfloat16."""
    sizes: dict[str, Any] = {"d_model": 2048, "n_layers": 22, "n_heads": 16, "n_kv_heads": 4, "d_mlp": 5632}
    if tiny:
        sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_mlp": 128}
    sizes |= {"vocab_size": 512 if tiny else 32000, "dtype": "bfloat16", "param_dtype": "bfloat16"}
    config = el.ModelConfig(**sizes, exits=(el.ExitConfig(sizes["n_layers"] // 2, "norm", tied=True),))
    params = jax.block_until_ready(init_params(config, jax.random.key(0)))
    return Big(config, params, *el.depth.without_exits(config, params))


def decode(record: Record, batch: int, args: argparse.Namespace) -> None:
    """Tokens per second at one batch size, as read from interleaved rounds."""
    big = big_model(args.tiny)
    sides, rows = make_sides(big, batch), traffic(big, batch)
    copy = 1e9 * record.found("ceilings").get("copy_gb_per_s", float("nan"))
    record.put(batch=batch, parameters=count(big.backbone), bytes_per_step=rows)
    for names in (("plain",), ("never", "half")):  # the first does not wait for the others to compile
        chosen = {name: sides[name] for name in ("one_token", "plain", *names)}
        seconds = interleave(chosen, args.rounds)
        record.put(**{f"seconds_{'_'.join(names)}": seconds})
        record.put(**{name: speeds(name, seconds, rows, batch, copy) for name in names})


def make_sides(big: Big, batch: int) -> dict[str, Callable[[], Any]]:
    """Functions that decode; those of one model share their programs."""
    rows = prompts(big, batch)
    layer = big.exits.exits[0].layer

    def side(model: el.ModelConfig, weights: Params, *thresholds: float, new: int = NEW) -> Callable[[], Any]:
        policy = el.ConfidenceExit("max_prob", thresholds, (layer,)) if thresholds else None
        sampler = el.Sampler(el.Decoder(model), weights, exit=policy, window=WINDOW)
        return lambda: [sample.tokens for sample in sampler.sample(rows, new)] and None

    return {
        "one_token": side(big.plain, big.backbone, new=1),
        "plain": side(big.plain, big.backbone),
        "never": side(big.exits, big.params, NEVER_EXITS),
        "half": side(big.exits, big.params, ALWAYS),
    }


def prompts(big: Big, batch: int) -> list[list[int]]:
    """Random token ids, the same for every batch size."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, big.plain.vocab_size, PROMPT).tolist() for _ in range(batch)]


def traffic(big: Big, batch: int) -> dict[str, float]:
    """Bytes that one decoding step reads: weights, vocabulary head, keys and values over the capacity.

    Rows of the embedding table and what is written are left out: together below a thousandth.
    """
    config, half = big.plain, big.plain.n_layers // 2
    row = 2 * config.n_kv_heads * config.head_dim * jax.numpy.dtype(config.dtype).itemsize
    cache = batch * bucket(PROMPT + NEW + WINDOW) * row
    trees = [jax.tree.leaves(big.params[f"layers_{i}"]) for i in range(config.n_layers)]
    layers = [cache + sum(x.nbytes for x in leaves) for leaves in trees]
    head, lower, upper = big.params["head"]["kernel"].nbytes, sum(layers[:half]), sum(layers[half:])
    return {
        "plain": lower + upper + head,
        "never": lower + upper + 2 * head,
        "half": lower + head + upper / WINDOW,
    }


def speeds(
    name: str, seconds: dict[str, list[float]], rows: dict[str, float], batch: int, copy: float
) -> dict[str, float]:
    """One side's speed without the time of a one-token call; ratios are formed within a round."""
    first = float(np.median(seconds["one_token"]))
    own, plain = (np.asarray(seconds[side]) - first for side in (name, "plain"))
    step = float(np.median(own)) / (NEW - 1)
    return {
        "tokens_per_s": batch / step,
        "ms_per_step": 1e3 * step,
        "gb_per_s": rows[name] / step / 1e9,
        "of_copy_bandwidth": rows[name] / step / copy,
        "speed_against_plain": float(np.median(plain / own)),
        "bytes_predict": rows["plain"] / rows[name],
    }


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))

"""Fair timing: every side once per round, in alternating order, in one process; medians decide."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.cost.counted import Workload, model_cost
from elastic_lm.cost.device_kinds import bandwidth_share

ROUNDS = 5


def time_once(run: Callable[[], Any]) -> float:
    """Seconds of one call, until every array that it returns is computed."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def interleave(sides: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds per call of several functions that are compared with each other.

    A machine slows down and speeds up while it measures. Alternating the sides exposes all of them to the
    same drift, and odd rounds run backwards so that no side always follows the same neighbour. Each side runs
    once before, untimed, to compile and to warm its caches.

    Args:
      sides: name -> function; what it returns may be jax arrays still being computed.
      rounds: timed calls per side.

    Returns:
      {name: [seconds of each round]}.

    Raises:
      ValueError: rounds is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: must be at least 1")
    for run in sides.values():
        time_once(run)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        order = list(sides) if i % 2 == 0 else list(sides)[::-1]
        for name in order:
            seconds[name].append(time_once(sides[name]))
    return seconds


def medians(sides: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds per call of each side, interleaved (see `interleave`)."""
    return {name: statistics.median(seconds) for name, seconds in interleave(sides, rounds).items()}


def matvec_bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes per second that one large float32 matrix-vector product reads, median of `repeats`.

    Args:
      megabytes: size of the matrix; well above any cache.
      repeats: timed products after one to warm up.
    """
    columns = 4096
    matrix = jnp.ones((megabytes * 2**20 // (4 * columns), columns), jnp.float32)
    vector = jnp.ones((columns,), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(matrix, vector).block_until_ready()
    seconds = [time_once(lambda: product(matrix, vector)) for _ in range(repeats)]
    return matrix.nbytes / statistics.median(seconds)


def bandwidth_note(config: ModelConfig, workload: Workload, seconds: float, copied: float = 0.0) -> str:
    """Gigabytes per second of weights and caches, and the share of what the memory gives.

    Args:
      config: of the model, decoded at full depth.
      workload: batch, and positions before a token on average.
      seconds: of one step of the whole batch.
      copied: bytes per second of `matvec_bandwidth`; 0 = it was not measured.
    """
    rate = model_cost(config.with_exits(()), workload).read_bytes / seconds
    published = bandwidth_share(rate / 1e9, jax.devices()[0].device_kind)
    shares = [f"{rate / copied:.0%} of one large product's"] if copied else []
    shares += [] if published is None else [f"{published:.0%} of the published bandwidth"]
    return f"{rate / 1e9:.1f} GB/s of weights and caches" + (f", {' and '.join(shares)}" if shares else "")

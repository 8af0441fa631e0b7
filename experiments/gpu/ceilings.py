"""What the card can do: copies, matrix products, and what a loop's kernels and branches cost."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from record import Record

REPEATS = 5
PARTS = ((1, 0), (17, 0), (1, 1), (1, 5))  # (kernels, branches) per iteration


def ceilings(record: Record, args: argparse.Namespace) -> None:
    """Puts copy_gb_per_s, tflops of products, and loop_us."""
    record.put(copy_gb_per_s=copy_bandwidth(2**22 if args.tiny else 2**30) / 1e9)
    size = 256 if args.tiny else 8192
    record.put(matmul_bf16_tflops=matmul_flops(size, jnp.bfloat16, "default") / 1e12)
    record.put(matmul_tf32_tflops=matmul_flops(size, jnp.float32, "default") / 1e12)
    record.put(matmul_f32_tflops=matmul_flops(size, jnp.float32, "highest") / 1e12)
    record.put(loop_us=loop_times(50 if args.tiny else 2000))


def seconds_each(function: Callable[[Any], Any], start: Any, count: int) -> float:
    """Median seconds of a call, of calls that are queued `count` at a time and feed the next one."""
    jax.block_until_ready(function(start))
    times = []
    for _ in range(REPEATS):
        began, x = time.perf_counter(), start
        for _ in range(count):
            x = function(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - began) / count)
    return statistics.median(times)


def copy_bandwidth(size: int) -> float:
    """Bytes read and written per second by a negation of `size` bytes."""
    x = jax.random.normal(jax.random.key(0), (size // 4,))
    return 2 * x.nbytes / seconds_each(jax.jit(jnp.negative), x, 20)


def matmul_flops(size: int, dtype: Any, precision: str) -> float:
    """FLOP/s of a square product of random matrices."""
    with jax.default_matmul_precision(precision):
        left, right = (jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in range(2))
        right = right * size**-0.5  # products of products stay of one size
        product = jax.jit(jnp.matmul)
        return 2 * size**3 / seconds_each(lambda x: product(x, right), left, 5)


def loop_times(iterations: int) -> dict[str, float]:
    """Microseconds per iteration of a `while_loop` with almost empty kernels and branches in its body.

    Args:
      iterations: of the loop; traced.

    Returns:
      {"KERNELS kernels, BRANCHES branches": microseconds}, and what one more of each adds.
    """
    found = {}
    for kernels, branches in PARTS:
        run = loop(kernels, branches)
        x = jax.random.uniform(jax.random.key(0), (256,))
        seconds = seconds_each(lambda x, run=run: run(iterations, x), x, 1)
        found[f"{kernels} kernels, {branches} branches"] = 1e6 * seconds / iterations
    one, many, branch, branches = found.values()
    return {**found, "a kernel more": (many - one) / 16, "a branch more": (branches - branch) / 4}


def loop(kernels: int, branches: int) -> Callable[..., jax.Array]:
    """A jitted loop (iterations, x [N] float32) -> x; the barriers keep its kernels apart."""

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        count, x = carry
        for _ in range(kernels):
            x = jax.lax.optimization_barrier(jnp.sin(x) + 0.5)
        for _ in range(branches):
            x = jax.lax.cond(x[0] < 2.0, lambda x: jnp.cos(x) + 0.5, lambda x: jnp.exp(-x), x)
            x = jax.lax.optimization_barrier(x)
        return count + 1, x

    def run(iterations: int, x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: c[0] < iterations, body, (jnp.int32(0), x))[1]

    return jax.jit(run)

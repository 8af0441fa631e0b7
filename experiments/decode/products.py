"""Products with few tokens on CPU: microseconds of each way to write y = x W^T, in a loop as decoding has it.

COMMAND   python experiments/decode/products.py --json experiments/decode/products.json
HARDWARE  a CPU; a minute
EXPECTED  README.md, which says what `elastic_lm.nn.linear` takes from it

Every form multiplies the gating and output kernels of an MLP, several layers in turns, so that kernels come
from as far away as they do in a model of that size.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.bench.timing import interleave
from elastic_lm.nn.linear import linear
from elastic_lm.report.machine import hardware, versions

SHAPES = {"embedded": (192, 1024, 12), "d768": (768, 3072, 3)}  # inputs, outputs, layers
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
FEW = 8  # above, a product per token takes long to compile, and to run
STEPS, ROUNDS = 20, 9
Form = Callable[[jax.Array, jax.Array], jax.Array]


def one_by_one(x_MI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """A matrix-vector product per token."""
    return jnp.stack([kernel_OI @ x for x in x_MI])


def plain(x_MI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """x W^T, left to the compiler."""
    return x_MI @ kernel_OI.T


def turned(x_MI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """(W x^T)^T, left to the compiler, which folds the transpositions into the product."""
    return (kernel_OI @ x_MI.T).T


def library(x_MI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """What decoding runs."""
    return linear(x_MI, kernel_OI)


def padded(x_MI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """(W x^T)^T with x^T and the result in memory, tokens padded to a power of two."""
    tokens = x_MI.shape[0]
    wide = max(4, 1 << (tokens - 1).bit_length())
    x_IM = jax.lax.optimization_barrier(jnp.pad(x_MI, ((0, wide - tokens), (0, 0))).T)
    return jax.lax.optimization_barrier(kernel_OI @ x_IM)[:, :tokens].T


FORMS: dict[str, Form] = {f.__name__: f for f in (one_by_one, plain, turned, padded, library)}


@functools.partial(jax.jit, static_argnums=0)
def steps(form: Form, x_MD: jax.Array, kernels: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """All layers, STEPS times; `form` is static."""

    def step(_: jax.Array, x_MD: jax.Array) -> jax.Array:
        for up, down in kernels:
            x_MD = jnp.tanh(form(form(x_MD, up), down))
        return x_MD

    return jax.lax.fori_loop(0, STEPS, step, x_MD)


def measure(inputs: int, outputs: int, layers: int) -> dict[int, dict[str, float]]:
    """{tokens: {form: microseconds of the two products of a layer, median}}."""
    normal = jax.random.normal
    keys = jax.random.split(jax.random.key(0), (layers, 2))
    kernels = [(normal(k[0], (outputs, inputs)), normal(k[1], (inputs, outputs))) for k in keys]
    found = {}
    for tokens in TOKENS:
        x = jnp.ones((tokens, inputs))
        forms = {n: f for n, f in FORMS.items() if f is not one_by_one or tokens <= FEW}
        sides: dict[str, Callable[[], Any]] = {
            n: functools.partial(steps, f, x, kernels) for n, f in forms.items()
        }
        times = interleave(sides, ROUNDS)
        found[tokens] = {n: round(statistics.median(t) / STEPS / layers * 1e6, 1) for n, t in times.items()}
    return found


def main() -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", required=True, type=Path)
    args = parser.parse_args()
    tables = {name: measure(*shape) for name, shape in SHAPES.items()}
    content = {"microseconds": tables, "hardware": hardware(), "versions": versions()}
    args.json.write_text(json.dumps(content, indent=1) + "\n")
    print("| model | tokens | " + " | ".join(FORMS) + " |")
    print("| --- |" + " ---: |" * (len(FORMS) + 1))
    for name, table in tables.items():
        for tokens, row in table.items():
            print(
                f"| {name} | {tokens} | "
                + " | ".join(f"{row[form]:.0f}" if form in row else "" for form in FORMS)
                + " |"
            )


if __name__ == "__main__":
    main()

"""What every decoder family decodes at on this machine, and what its exits and drafts would have to bring.

    python experiments/families/run.py --json experiments/families/results.json
    python experiments/families/run.py --report experiments/families/results.json

Each family keeps what makes it one (norms, rotation, windows, activations, biases, multipliers) and gets the
same sizes: 12 layers, width 512, vocabulary 16,384, float32, random weights. Families that are in the file
already are left out, so that a run that was cut off goes on.

The parts of an iteration come from `bench.parts`. With F full depth, S + L the lower half and a look at the
exit's head, and D_w a pass of the upper half over w positions,

    break-even share of an exit at half depth  p:   S + L + (1 - p) D_1 = F
    tokens per pass that lookup needs to pay      :   time of a pass over 8 positions / F
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

import elastic_lm as el
from elastic_lm.bench.parts import Shape, measure_parts
from elastic_lm.bench.timing import matvec_bandwidth
from elastic_lm.cost.counted import Workload, model_cost
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.hf import config_from_hf
from elastic_lm.models.registry import init_params
from elastic_lm.report.machine import hardware, versions

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "hf"
LAYERS, WIDTH, VOCABULARY, HEADS, MLP = 12, 512, 16384, 8, 2048
WINDOW, CAPACITY = 8, 128


def enlarged(config: el.ModelConfig) -> el.ModelConfig:
    """The family of a small config, at the size that all families are measured at."""
    groups = {config.n_heads: HEADS, 1: 1}.get(config.n_kv_heads, HEADS // 2)
    repeats = -(-LAYERS // config.n_layers)
    sizes: dict[str, Any] = {
        name: (tuple(getattr(config, name)) * repeats)[:LAYERS] for name in ("windows", "rotated")
    }
    return dataclasses.replace(
        config,
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        n_kv_heads=groups,
        head_dim=WIDTH // HEADS,
        d_mlp=MLP,
        max_len=max(config.max_len, 2 * CAPACITY),
        **sizes,
    )


def measured(config: el.ModelConfig, rounds: int) -> dict[str, float]:
    """One family's row."""
    params = init_params(config, jax.random.key(0))
    half = config.n_layers // 2
    exits = (el.ExitConfig(half, kind="norm", tied=True, init="copy"),)
    with_exit = el.attach_exits(config, params, exits, jax.random.key(1))
    shape = Shape(batch=1, capacity=CAPACITY, window=WINDOW)

    parts = measure_parts(config, params, shape, with_exit=with_exit, rounds=rounds)

    assert parts.exit is not None
    read = model_cost(config, Workload(context=16)).read_bytes
    left = parts.full - parts.exit.shallow - parts.exit.look
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokens_per_s": 1 / parts.full,
        "gb_per_s": read / parts.full / 1e9,
        "product_gb_per_s": matvec_bandwidth() / 1e9,
        "break_even_share": 1 - left / parts.exit.deep[1],
        "lookup_needs": parts.passes[WINDOW - 1] / parts.full,
    }


def verdict(row: dict[str, float]) -> str:
    """What a user of the family may expect, in words."""
    share = row["break_even_share"]
    exits = "never" if share >= 1 else f"above {max(share, 0):.0%} leaving"
    return f"exits pay {exits}, lookup above {row['lookup_needs']:.2f} tokens per pass"


def report(found: dict[str, Any]) -> str:
    """The table of the README."""
    lines = [
        "| family | M parameters | tokens/s | GB/s | of one large product's | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(found["families"].items()):
        share = row["gb_per_s"] / row["product_gb_per_s"]
        numbers = (
            f"{row['parameters'] / 1e6:.1f} | {row['tokens_per_s']:.0f} | {row['gb_per_s']:.1f} | {share:.2f}"
        )
        lines.append(f"| `{name}` | {numbers} | {verdict(row)} |")
    shares = [row["gb_per_s"] / row["product_gb_per_s"] for row in found["families"].values()]
    lines += ["", f"Median share {np.median(shares):.2f}, from {min(shares):.2f} to {max(shares):.2f}."]
    return "\n".join(lines)


def main() -> None:
    """Measures the families that the file lacks, or prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="results are added to this file, one family at a time")
    parser.add_argument("--report", type=Path, help="print the table of this file, and measure nothing")
    parser.add_argument("--families", nargs="+", default=sorted(os.listdir(GOLDEN)))
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    if flags.report:
        print(report(json.loads(flags.report.read_text())))
        return

    found: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "families": {}}
    if flags.json and flags.json.exists():
        found = json.loads(flags.json.read_text())
    for name in flags.families:
        if name in found["families"]:
            continue
        config = config_from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
        row = measured(enlarged(config), flags.rounds)
        found["families"][name] = row
        print(
            f"{name}: {row['tokens_per_s']:.0f} tokens/s, {row['gb_per_s']:.1f} GB/s, {verdict(row)}",
            flush=True,
        )
        if flags.json:
            write_text_whole(flags.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

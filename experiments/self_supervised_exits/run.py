"""Which confidence separates right from wrong best, and which way of choosing thresholds keeps its word.

COMMAND   python experiments/self_supervised_exits/run.py --out runs/self_supervised_study
HARDWARE  two CPU cores
DURATION  about a quarter of an hour when nothing else runs
EXPECTED  README.md beside this file

For every seed, exits with gates are trained on the embedded model's own predictions. Then, on held-out text:

- every metric's mean depth at the same agreement: thresholds chosen on the test tokens themselves, so that
  only the separation counts;
- per-exit strategies, thresholds chosen jointly, and risk control: how often fresh text falls below the
  target, over calibration sets drawn from the pool with replacement, and the depth they need.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np

import elastic_lm as el
from elastic_lm.depth.guarantee import control
from elastic_lm.depth.per_exit import Strategy
from elastic_lm.depth.threshold_search import choose_thresholds, exit_outcome
from elastic_lm.models.decoder import Params
from elastic_lm.report.machine import hardware, versions

matplotlib.use("Agg")
TARGETS = (0.8, 0.9, 0.95, 0.98)
LAYERS = (3, 6, 9)
EPSILON = 0.05


def main() -> None:
    """Runs every seed and writes results.json and two plots."""
    args = parse()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = el.Tokenizer.load(el.embedded_model())
    runs = []
    for seed in range(args.seeds):
        config, params, metrics = train(out / f"seed{seed}", args.steps, seed)
        seen = {m: look(config, params, tokenizer, m, args.tokens) for m in el.depth.METRICS}
        runs.append(
            {
                "seed": seed,
                "training": metrics,
                "metrics": {m: separation(seen[m]) for m in el.depth.METRICS},
                "strategies": strategies(seen["entropy"], args.draws, args.sequences, seed),
            }
        )
        print(json.dumps(runs[-1]["metrics"], indent=1), flush=True)
    result = {"args": vars(args), "hardware": hardware(), "versions": versions(), "runs": runs}
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(tables(result))
    plot(result, out)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=60_000, help="held-out tokens per metric")
    parser.add_argument("--draws", type=int, default=200, help="calibration sets per strategy")
    parser.add_argument("--sequences", type=int, default=200, help="sequences per calibration set")
    return parser.parse_args()


def train(folder: Path, steps: int, seed: int) -> tuple[el.ModelConfig, Params, dict[str, float]]:
    """Exits after a quarter, a half and three quarters of the layers, with gates."""
    data = el.DataConfig(source="stdlib", seq_len=128, batch_size=16, seed=seed)
    run = el.RunConfig(
        exits=tuple(el.ExitConfig(layer, "norm", gate=32) for layer in LAYERS),
        data=data,
        method=el.depth.SelfSupervisedConfig(),
        train=el.TrainConfig(
            init_from=str(el.embedded_model()),
            steps=steps,
            lr=1e-3,
            warmup=10,
            weight_decay=0.0,
            eval_every=0,
            save_every=steps,
            seed=seed,
        ),
    )
    return el.train.fit(run, folder)


def look(
    config: el.ModelConfig, params: Params, tokenizer: el.Tokenizer, metric: str, tokens: int
) -> el.depth.Observations:
    """Held-out tokens of files that nothing was trained on, in short sequences."""
    data = el.DataConfig(source="stdlib", seq_len=64, batch_size=32)
    rows = itertools.islice(el.data.eval_batches(data, tokenizer, "test"), tokens // (64 * 32))
    return el.depth.observe(config, params, rows, metric=metric)


def separation(seen: el.depth.Observations) -> dict[str, float]:
    """Mean layers at each agreement, thresholds chosen on the very tokens."""
    depths = (*seen.layers, seen.n_layers)
    chosen = choose_thresholds(seen.confidence, seen.agrees, depths, TARGETS)
    tokens = (seen.confidence, seen.agrees, depths)
    return {str(t): exit_outcome(*tokens, chosen[t]).mean_layers for t in TARGETS}


def strategies(seen: el.depth.Observations, draws: int, size: int, seed: int) -> dict[str, dict[str, Any]]:
    """Share of calibration sets after which the pool's agreement is below the target, and mean layers."""
    rng = np.random.default_rng(seed)
    ids = np.unique(seen.sequence)
    where = {i: np.flatnonzero(seen.sequence == i) for i in ids}
    depths = (*seen.layers, seen.n_layers)
    target = 0.9
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(draws):
        sets = [draw(seen, where, rng.choice(ids, size // 2)) for _ in range(2)]
        both = join(*sets)
        named = {
            s: el.depth.exit_thresholds(both.confidence, both.agrees, target, s) for s in get_args(Strategy)
        }
        named["joint"] = choose_thresholds(both.confidence, both.agrees, depths, [target])[target]
        named["risk control"] = control(*sets, el.RiskControl(target, EPSILON))[0]
        for name, thresholds in named.items():
            result = exit_outcome(seen.confidence, seen.agrees, depths, thresholds)
            found.setdefault(name, []).append((result.agreement, result.mean_layers))
    return {
        name: {
            "target": target,
            "below_target": float(np.mean([a < target for a, _ in rows])),
            "agreement": float(np.mean([a for a, _ in rows])),
            "mean_layers": float(np.mean([n for _, n in rows])),
        }
        for name, rows in found.items()
    }


def draw(
    seen: el.depth.Observations, where: dict[int, np.ndarray], chosen: np.ndarray
) -> el.depth.Observations:
    """Sequences drawn with replacement, each a sequence of its own."""
    index = np.concatenate([where[i] for i in chosen])
    sequence = np.repeat(np.arange(len(chosen)), [len(where[i]) for i in chosen])
    fields = ("confidence", "agrees", "correct", "nats", "weights", "targets")
    picked = {name: getattr(seen, name)[index] for name in fields}
    return dataclasses.replace(seen, sequence=sequence, gate=None, **picked)


def join(first: el.depth.Observations, second: el.depth.Observations) -> el.depth.Observations:
    """Both sets of tokens."""
    fields = ("confidence", "agrees", "correct", "nats", "weights", "targets", "sequence")
    both = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in fields}
    return dataclasses.replace(first, **both)


def spread(values: list[float], digits: int) -> str:
    """Mean and range."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def tables(result: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    runs = result["runs"]
    lines = [
        "| metric | " + " | ".join(f"{t:.0%}" for t in TARGETS) + " |",
        "|---" * (len(TARGETS) + 1) + "|",
    ]
    for metric in el.depth.METRICS:
        cells = [spread([r["metrics"][metric][str(t)] for r in runs], 2) for t in TARGETS]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    lines += ["", "| strategy | below target | agreement | mean layers |", "|---|---|---|---|"]
    for name in runs[0]["strategies"]:
        rows = [r["strategies"][name] for r in runs]
        cells = [
            spread([row["below_target"] for row in rows], 3),
            spread([row["agreement"] for row in rows], 4),
            spread([row["mean_layers"] for row in rows], 2),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(result: dict[str, Any], out: Path) -> None:
    """Depth against agreement for every metric."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for metric in el.depth.METRICS:
        layers = [[r["metrics"][metric][str(t)] for t in TARGETS] for r in result["runs"]]
        axes.errorbar(TARGETS, np.mean(layers, 0), yerr=np.ptp(layers, 0) / 2, marker="o", label=metric)
    axes.set_xlabel("agreement with the full model")
    axes.set_ylabel("mean layers of 12")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "metrics.png", dpi=120)


if __name__ == "__main__":
    main()

"""Batch size against gain: rows that leave one by one, rows that wait for each other, and full depth.

COMMAND   python experiments/all_dials/batches.py --model SMOLLM2 --data data/english --out runs/all_dials
HARDWARE  two CPU cores
DURATION  about ten minutes of both cores
EXPECTED  README.md beside this file

Exits in closed form with thresholds for 90 % (even rows of held-out instructions). Sides of a batch take
turns in one process: full depth without exits; per row (a deep tick as soon as one row waits, half of the
rows, or all of them, `DecodeOptions.fire_share`); and `DecodeOptions.together`, where a token leaves early
only if all rows are confident (CALM). Prefill included. Spread: half of what the middle half of the rounds'
ratios spans.
"""

import functools
import json
import statistics
from typing import Any

import matplotlib
import numpy as np
from methods import base_seen
from study import Cells, Record, base, batches, begin, held_out_records, markdown, parser

import elastic_lm as el
from elastic_lm.bench.timing import interleave
from elastic_lm.depth.threshold_search import choose_thresholds
from elastic_lm.models.decoder import Decoder

matplotlib.use("Agg")
TARGET = 0.9
SIDES: dict[str, dict[str, Any]] = {
    "per row, one waits": {"fire_share": 0.0},
    "per row, half wait": {"fire_share": 0.5},
    "per row, all wait": {"fire_share": 1.0},
    "wait for all": {"together": True},
}


def main() -> None:
    """Measures every size; rewrites batches.json after each, then prints and draws."""
    found = parser(__doc__, "runs/all_dials")
    found.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    found.add_argument("--new-tokens", type=int, default=32)
    found.add_argument("--rounds", type=int, default=5)
    args = found.parse_args()
    out = begin(args)
    if args.tiny:
        args.sizes, args.new_tokens, args.rounds = [1, 2], 4, 1
    cells = Cells(out / "batches.json", args)

    model, tokenizer = base(args, out)
    seen = base_seen(out, model, list(batches(args, tokenizer, "held_out"))).half(0)
    thresholds = choose_thresholds(seen.margin, seen.agrees, seen.layers, [TARGET])[TARGET]
    policy = el.ConfidenceExit("margin", thresholds, seen.layers[:-1])
    prompts = [
        tokenizer.encode(r["prompt"], bos=True)[:32] for r in held_out_records(args, 4 * max(args.sizes))
    ]
    prompts = [p for p in prompts if len(p) > 16 or args.tiny]

    plain = el.depth.without_exits(*model)
    samplers = {"full depth": el.Sampler(Decoder(plain[0]), plain[1])}
    for name, options in SIDES.items():
        samplers[name] = el.Sampler(Decoder(model[0]), model[1], exit=policy, **options)
    for size in args.sizes:
        rows = [prompts[i % len(prompts)] for i in range(size)]
        cells.get(str(size), functools.partial(timed, samplers, rows, args.new_tokens, args.rounds))
    print(table(cells.found))
    plot(cells.found, str(out / "batches.png"))


def timed(samplers: dict[str, el.Sampler], rows: list[list[int]], count: int, rounds: int) -> Record:
    """Milliseconds per token of the batch, and speed against full depth."""
    samples: dict[str, list[el.Sample]] = {}

    def run(name: str) -> None:
        samples[name] = samplers[name].sample(rows, count, ignore_eos=True)

    seconds = interleave({name: functools.partial(run, name) for name in samplers}, rounds)
    found = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(seconds["full depth"], own, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else (0, 0, 0)
        depths = [depth for sample in samples[name] for depth in sample.exit_layers]
        n_layers = max(depths)
        found[name] = {
            "ms per token": 1000 * statistics.median(own) / (count * len(rows)),
            "speed": statistics.median(ratios),
            "spread": (high - low) / 2,
            "mean_layers": float(np.mean(depths)),
            "leave": float(np.mean(np.asarray(depths) < n_layers)),
            "passes": [int(n) for n in samples[name][0].stats.segment_ticks],
        }
    return found


def table(cells: dict[str, Any]) -> str:
    """One row per size and side."""
    rows = [
        [
            size,
            name,
            f"{one['ms per token']:.1f}",
            f"{one['speed']:.3f} ± {one['spread']:.3f}",
            f"{one['mean_layers']:.1f}",
            f"{one['leave']:.2f}",
            json.dumps(one["passes"]),
        ]
        for size, cell in cells.items()
        for name, one in cell["value"].items()
    ]
    header = [
        "rows",
        "side",
        "ms/token",
        "speed, full depth = 1",
        "mean layers",
        "leave",
        "passes per segment",
    ]
    return markdown(header, rows)


def plot(cells: dict[str, Any], file: str) -> None:
    """Speed over the size of the batch."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name in SIDES:
        own = [cell["value"][name] for cell in cells.values()]
        speed, bars = [one["speed"] for one in own], [one["spread"] for one in own]
        axes.errorbar([int(size) for size in cells], speed, bars, marker="o", capsize=3, label=name)
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows")
    axes.set_ylabel("speed, full depth = 1")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

"""Flextron in small: quality against measured latency of sub-networks, and of models trained alone.

COMMAND   python experiments/flextron/run.py --out runs/flextron_embedded
          python experiments/flextron/run.py --base runs/english/model --data data/english \\
              --out runs/flextron_english
HARDWARE  CPU, one core: `taskset -c 0 python ...`
DURATION  see README.md
EXPECTED  choosing widths layer by layer is worth far more than 60 steps of training: knapsack on the base
          that was only ranked is ahead of the best uniform sub-network of the elastic model; see README.md

    zero-shot   the base, ranked by importance and not trained: uniform sub-networks, and knapsack
    elastic     Flextron's first stage on the ranked base: uniform sub-networks (the most expensive within a
                budget, or the one with the least loss on training text), greedy, knapsack and random ones
    matformer   one MLP width per step on the ranked base; uniform sub-networks
    scratch     new models of the sizes of uniform sub-networks, trained alone (Muon)
    slice       uniform slices of the ranked base, fine-tuned alone
    router      sub-networks that routers choose on the elastic model, kept as it is: one per budget (trained
                end to end, or by the surrogate), and widths for every token

Every training of a seed reads the same tokens, but that of routers, which has steps of its own. Budgets are
shares of the whole model's time per decoded token at batch 1, by a latency table that is built once and kept
(OUT/latency.json); in the end the chosen sub-networks are timed against the whole model, in turns with it
(OUT/times.json). Finished trainings are kept in OUT/seed_SEED/NAME and measured arms in
OUT/seed_SEED/ARM.json, so the same command goes on after a stop.

Papers: Flextron, arXiv 2406.10260; MatFormer, arXiv 2310.07707; Nemotron Elastic, arXiv 2511.16664.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from arms import ARMS
from report import plot, tables
from study import Settings, Study, key
from times import latency_table, timed

import elastic_lm as el
from elastic_lm.config.parse import from_dict
from elastic_lm.report.machine import hardware, versions


def main() -> None:
    """Runs every arm of every seed, times what was chosen, and writes results.json and latency.png."""
    args = parse()
    out = Path(args.out)
    base = str(el.embedded_model()) if args.base == "embedded" else args.base
    check(args, out)
    table = latency_table(base, out, args.rounds)
    runs = [one_seed(args, base, out, seed, table) for seed in args.seeds]
    times = timed(table, runs, out, args.rounds)
    for row in (row for run in runs for row in run["rows"]):
        row.setdefault("relative", 1.0 if row["how"] == "full" else times.get(key(row["subnet"])))
    result: dict[str, Any] = {
        "args": vars(args),
        "hardware": hardware(),
        "versions": versions(),
        "whole_ms": table.total(el.Subnet.full(table.model)),
        "runs": runs,
    }
    result["tables"] = tables(runs)
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result["tables"])
    plot(runs, out / "latency.png")


def parse() -> argparse.Namespace:
    """Flags of this study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="embedded", help="model folder, or embedded")
    parser.add_argument("--data", default="stdlib", help="folder with train/ and held_out/, or stdlib")
    parser.add_argument("--out", default="runs/flextron_embedded")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.75, 0.6, 0.45])
    parser.add_argument("--alone", type=float, nargs="+", default=[0.75, 0.45], help="budgets of lone models")
    parser.add_argument("--steps", type=int, default=60, help="of every training")
    parser.add_argument("--lr", type=float, default=1.5e-4, help="of elastic and matformer")
    parser.add_argument("--slice-lr", type=float, default=1e-3, help="of slices: nothing has to be kept")
    parser.add_argument("--scratch-lr", type=float, default=5e-3, help="of Muon")
    parser.add_argument("--samples", type=int, default=2, help="random sub-networks per step of elastic")
    parser.add_argument("--smallest-share", type=float, default=0.1, help="of steps that train the smallest")
    parser.add_argument("--distil", type=float, default=0.5)
    parser.add_argument("--teacher", default="live", choices=["live", "frozen"])
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=10, help="batches that losses are measured on")
    parser.add_argument("--damage", type=int, default=2, help="training batches that searches read")
    parser.add_argument("--random", type=int, default=6, help="random sub-networks per budget")
    parser.add_argument("--rounds", type=int, default=41, help="timed runs of every program")
    return parser.parse_args()


def check(args: argparse.Namespace, out: Path) -> None:
    """Refuses an output folder of a study with other flags.

    Raises:
      ValueError: OUT/study.json has other flags.
    """
    free = ("out", "seeds", "arms", "rounds")
    flags = {name: value for name, value in vars(args).items() if name not in free}
    kept = out / "study.json"
    if kept.is_file() and (old := json.loads(kept.read_text())) != flags:
        raise ValueError(f"{kept}: the study there has the flags {old}, not {flags}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(flags, indent=1) + "\n")


def one_seed(
    args: argparse.Namespace, base: str, out: Path, seed: int, table: el.LatencyTable
) -> dict[str, Any]:
    """Rows and seconds of all arms of one seed."""
    folder = out / f"seed_{seed}"
    study = Study(base, folder, data_config(args, seed), table.decode, settings(args))
    run: dict[str, Any] = {"seed": seed, "rows": [], "seconds": {}}
    for name in args.arms:
        kept = folder / f"{name}.json"
        if not kept.is_file():
            began = time.perf_counter()
            rows = ARMS[name](study)
            content = {"rows": rows, "seconds": time.perf_counter() - began}
            kept.write_text(json.dumps(content, indent=1) + "\n")
            print(f"seed {seed}, {name}: {content['seconds']:.0f} s", flush=True)
        found = json.loads(kept.read_text())
        run["rows"] += found["rows"]
        run["seconds"][name] = found["seconds"]
    return run


def settings(args: argparse.Namespace) -> Settings:
    """The flags that arms read."""
    names = Settings.__dataclass_fields__
    return from_dict(Settings, {name: value for name, value in vars(args).items() if name in names})


def data_config(args: argparse.Namespace, seed: int) -> el.DataConfig:
    """Text, and the shape of a batch."""
    shape = {"seq_len": args.seq_len, "batch_size": args.batch_size, "seed": seed}
    if args.data == "stdlib":
        return el.DataConfig(source="stdlib", **shape)
    folder = Path(args.data)
    paths = {"paths": (str(folder / "train"),), "eval_paths": (str(folder / "held_out"),)}
    return el.DataConfig(source="text", **paths, **shape)


if __name__ == "__main__":
    main()

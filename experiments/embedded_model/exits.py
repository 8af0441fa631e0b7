"""What exits after layers 3, 6 and 9 of a model gain: python exits.py OUT NAME=FOLDER...

Every model stays frozen while its exits are tuned for 60 steps. On 18,432 tokens of the test split: agreement
with the full model, and the largest share of tokens whose margin lets them leave while 99 % of all tokens
stay as they are. The cut is the best one on these very tokens.
"""

import itertools
import json
import sys
from pathlib import Path

import elastic_lm as el
from elastic_lm.depth.threshold_search import choose_thresholds, exit_outcome

LAYERS = (3, 6, 9)
DATA = el.DataConfig(source="stdlib", seq_len=256, batch_size=8)
BATCHES = 9  # of the test split
TARGET = 0.99


def main(out: Path, models: dict[str, str]) -> None:
    """Tunes exits on every model and writes exits.json."""
    rows = {name: gains(tuned(folder, out / name)) for name, folder in models.items()}
    (out / "exits.json").write_text(json.dumps(rows, indent=1) + "\n")
    for name, exits in rows.items():
        print(name, {layer: f"{e['agreement']:.3f}, {e['share']:.1%}" for layer, e in exits.items()})


def tuned(folder: str, workdir: Path) -> el.depth.Observations:
    """What exits tuned on the frozen model in `folder` say about the test split."""
    run = el.RunConfig(
        exits=tuple(el.ExitConfig(layer, "norm") for layer in LAYERS),
        data=DATA,
        method=el.depth.EETuningConfig(),
        train=el.TrainConfig(init_from=folder, steps=60, lr=1e-3, warmup=10, weight_decay=0.0, eval_every=0),
    )
    config, params, _ = el.train.fit(run, workdir)
    batches = el.data.eval_batches(DATA, el.Tokenizer.load(folder), "test")
    return el.depth.observe(config, params, itertools.islice(batches, BATCHES), metric="margin")


def gains(seen: el.depth.Observations) -> dict[int, dict[str, float]]:
    """Agreement and share of every exit, as if it were the only one."""
    counted = seen.weights > 0
    found = {}
    for i, layer in enumerate(seen.layers):
        tokens = seen.confidence[counted, i, None], seen.agrees[counted, i, None], (layer, seen.n_layers)
        thresholds = choose_thresholds(*tokens, [TARGET])[TARGET]
        found[layer] = {
            "agreement": float(tokens[1].mean()),
            "share": exit_outcome(*tokens, thresholds).shares[0],
        }
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), dict(arg.split("=", 1) for arg in sys.argv[2:]))

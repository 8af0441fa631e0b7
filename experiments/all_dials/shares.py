"""What 1, .1 and .01 % of the tokens of pretraining buy each method, on a model whose pretraining is known.

COMMAND   python experiments/all_dials/shares.py --out runs/shares
HARDWARE  two CPU cores
DURATION  README.md; every cell is kept, `--resume` goes on
EXPECTED  README.md beside this file

The model is the embedded one (12 layers, 3 million parameters), which was trained for 3,500 steps of 8 x 256
tokens of Python code (experiments/embedded_model), so that 1 % are 71,680 tokens. SmolLM2's authors trained
it on 2 T tokens, of which .01 % are more than two cores can read in a year. Exits are after layers 6, 9 and
10 of 12, sub-networks have three quarters or half of the neurons. Held-out: 16,384 tokens of files that
nothing was trained on. What trains reads text that the model was pretrained on, too.

Exits of ee_tuning, self_supervised and joint start in closed form, fitted on the very tokens that they train
on then; "closed form" stops there. Agreement is with the untrained whole model.
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import matplotlib
import numpy as np
from study import (
    Cells,
    Model,
    Record,
    begin,
    by_depth,
    copied_exits,
    exit_layers,
    fitted_exits,
    look,
    markdown,
    parser,
    spread,
    train,
)

import elastic_lm as el
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.train.pretraining import Pretraining
from elastic_lm.width.importance import STORAGE_GROUPS

matplotlib.use("Agg")
PRETRAINING = 3500 * 8 * 256  # tokens
SHARES = {0.0001: 1, 0.001: 4, 0.01: 8}  # of them -> rows of a step
ARMS = ("closed form", "ee_tuning", "self_supervised", "soft", "joint", "elastic", "plain")
WIDTHS = (0.75, 0.5)
MENU = el.Menu(mlp=(0.5, 0.75, 1.0), heads=(1.0,))


def main() -> None:
    """Runs every share, seed and method; rewrites shares.json after each, then prints and draws."""
    args = parse()
    out = begin(args)
    cells = Cells(out / "shares.json", args)
    tokenizer = el.Tokenizer.load(args.model)
    decoder, params = load_decoder(args.model)
    plain = el.depth.without_exits(decoder.config, params)
    held_out = list(itertools.islice(read(args, tokenizer, 8, 0, "test"), args.test_batches))
    ranking = list(itertools.islice(read(args, tokenizer, 8, 100), 4))
    importance = el.width.rank(*plain, ranking)
    groups = int(np.gcd(STORAGE_GROUPS, plain[0].d_mlp))
    plain = el.width.permute(*plain, importance, groups=groups)
    reference = look(plain, held_out).choice[:, -1]

    def quality(model: Model) -> list[Record]:
        return by_depth(look(model, held_out), reference)

    def widths(model: Model) -> list[Record]:
        subnets = [el.Subnet.uniform(model[0], mlp=share) for share in WIDTHS]
        return [quality(el.slice_params(*model, subnet))[-1] for subnet in subnets]

    cells.get("0", lambda: {"depths": quality(copied_exits(plain)), "widths": widths(plain)})
    shares = {share: rows for share, rows in SHARES.items() if not args.tiny or share < 0.001}
    for (share, rows), seed, arm in itertools.product(shares.items(), args.seeds, ARMS):

        def one(share: float = share, rows: int = rows, seed: int = seed, arm: str = arm) -> Record:
            model, about = trained(args, tokenizer, plain, arm, share, rows, seed)
            depths = quality(copied_exits(model) if arm in ("soft", "plain") else model)
            return {"training": about, "depths": depths} | (
                {"widths": widths(model)} if arm in ("elastic", "plain") else {}
            )

        cells.get(f"{share}/{arm}/{seed}", one)
    print(tables(cells.found))
    plot(cells.found, str(out / "shares.png"))


def parse() -> argparse.Namespace:
    """Command line."""
    found = parser(__doc__, "runs/shares")
    found.set_defaults(model=str(el.embedded_model()), test_batches=8)
    next(a for a in found._actions if a.dest == "model").required = False
    found.add_argument("--lr", type=float, default=1e-4, help="of the layers; exits learn ten times as fast")
    return found.parse_args()


def read(
    args: argparse.Namespace, tokenizer: el.Tokenizer, rows: int, seed: int, split: str = "train"
) -> Iterator[el.data.Batch]:
    """Batches of the interpreter's library."""
    data = el.DataConfig(source="stdlib", seq_len=args.seq_len, batch_size=rows, seed=seed)
    found = (
        el.data.train_batches(data, tokenizer)
        if split == "train"
        else el.data.eval_batches(data, tokenizer, split)
    )
    return (el.data.Batch(**arrays) for arrays in found)


def trained(
    args: argparse.Namespace,
    tokenizer: el.Tokenizer,
    plain: Model,
    arm: str,
    share: float,
    rows: int,
    seed: int,
) -> tuple[Model, Record]:
    """The model after one training."""
    steps = max(2, round(share * PRETRAINING / (rows * args.seq_len)))
    text = list(itertools.islice(read(args, tokenizer, rows, seed), steps))
    exits = exit_layers(plain[0].n_layers)
    model = plain if arm in ("soft", "elastic", "plain") else fitted_exits(plain, exits, text)
    if arm == "closed form":
        return model, {"tokens": sum(batch.tokens.size for batch in text)}
    config, params = model
    method: Any = {
        "ee_tuning": lambda: el.depth.EETuning(config),
        "self_supervised": lambda: el.depth.SelfSupervisedExits(config, seed=seed),
        "soft": lambda: el.depth.SortedFineTuning(config, depths=exits, seed=seed),
        "joint": lambda: el.depth.JointTraining(config, distil=1.0),
        "elastic": lambda: el.width.ElasticTraining(config, menu=MENU, samples=1, distil=1.0, seed=seed),
        "plain": lambda: Pretraining(config),
    }[arm]()
    how: dict[str, Any] = {"steps": steps, "lr": args.lr}
    if arm in ("ee_tuning", "self_supervised"):
        how["lr"] *= 10
    if arm == "joint":
        how |= {"faster": tuple(e.name for e in config.exits), "factor": 10.0}
    params, about = train(method, params, iter(text), **how)
    return (config, jax.tree.map(np.asarray, params)), about


def grouped(cells: dict[str, Any]) -> dict[tuple[float, str], list[Record]]:
    """By share and method, seed by seed."""
    found: dict[tuple[float, str], list[Record]] = {}
    for name, cell in cells.items():
        if "/" in name:
            share, arm, _ = name.split("/")
            found.setdefault((float(share), arm), []).append(cell["value"])
    return found


def means(runs: list[Record], which: str, key: str) -> list[float]:
    """Mean over exits (or widths) of each seed."""
    parts = [run[which][:-1] if which == "depths" else run[which] for run in runs]
    return [float(np.mean([one[key] for one in part])) for part in parts]


def tables(cells: dict[str, Any]) -> str:
    """Means over exits and over widths, and full depth."""
    runs = {(0.0, "nothing"): [cells["0"]["value"]], **grouped(cells)}
    rows = []
    for (share, arm), own in runs.items():
        full = [run["depths"][-1]["loss"] for run in own]
        wide = [spread(means(own, "widths", k)) if "widths" in own[0] else "" for k in ("loss", "agreement")]
        exits = [spread(means(own, "depths", k)) for k in ("loss", "agreement")]
        if arm == "elastic":
            exits = ["", ""]
        rows.append([f"{100 * share:g} %", arm, *exits, *wide, spread(full)])
    header = ["tokens", "method", "exits: nats/token", "agreement", "widths: nats/token", "agreement"]
    return markdown([*header, "full depth: nats/token"], rows)


def plot(cells: dict[str, Any], file: str) -> None:
    """Loss of exits and of widths over the share of tokens."""
    from matplotlib import pyplot

    start, found = cells["0"]["value"], grouped(cells)
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axes, which in zip(panels, ("depths", "widths"), strict=True):
        axes.axhline(means([start], which, "loss")[0], color="#888888", label="nothing trained")
        for arm in ARMS:
            own = {s: r for (s, a), r in found.items() if a == arm and which in r[0]}
            if arm == "elastic" and which == "depths":
                continue
            values = [means(runs, which, "loss") for runs in own.values()]
            if values:
                middle = [np.mean(v) for v in values]
                bars = [[m - min(v) for m, v in zip(middle, values, strict=True)]]
                bars.append([max(v) - m for m, v in zip(middle, values, strict=True)])
                axes.errorbar(list(own), middle, bars, marker="o", capsize=3, label=arm)
        axes.set_xscale("log")
        axes.set_xlabel("share of the tokens of pretraining")
        axes.set_ylabel("nats per token, mean over " + {"depths": "exits", "widths": "widths"}[which])
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

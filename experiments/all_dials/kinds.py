"""Where tokens leave, by kind of token: does a model decide early what continues a word, and what begins one?

COMMAND   python experiments/all_dials/kinds.py --model SMOLLM2 --data data/english --out runs/all_dials
HARDWARE  two CPU cores
DURATION  a minute where methods.py has run (it keeps what every depth says in OUT/seen.npz)
EXPECTED  README.md beside this file

Exits in closed form after three layers, thresholds for 90 % and 95 % from the even rows of held-out
instructions, measured on the odd ones. A token's kind is that of the token that full depth says. Lower layers
would have to say it, so that a kind whose tokens are easy leaves early. Spread: 200 draws of the odd rows
with replacement, 5th to 95th percentile.
"""

import matplotlib
import numpy as np
from methods import base_seen
from study import Cells, Record, Seen, base, batches, begin, markdown, parser

import elastic_lm as el
from elastic_lm.depth.threshold_search import choose_thresholds, emitting_exit

matplotlib.use("Agg")
KINDS = ("word start", "continuation", "digits", "punctuation", "white space", "end of text")
DRAWS = 200


def main() -> None:
    """Measures, writes kinds.json and kinds.png, and prints the table."""
    args = parser(__doc__, "runs/all_dials").parse_args()
    out = begin(args)
    cells = Cells(out / "kinds.json", args)
    model, tokenizer = base(args, out)
    seen = base_seen(out, model, list(batches(args, tokenizer, "held_out")))
    for target in (0.9, 0.95):
        cells.get(str(target), lambda target=target: by_kind(seen, tokenizer, target))
    print(table(cells.found))
    plot(cells.found, seen.layers, str(out / "kinds.png"))


def kind_of(text: str) -> str:
    """The kind of a token, by its text."""
    bare = text.strip()
    if not text:
        return "end of text"
    if not bare:
        return "white space"
    if any(c.isdigit() for c in bare):
        return "digits"
    if not any(c.isalpha() for c in bare):
        return "punctuation"
    return "word start" if text[0].isspace() or bare[0].isupper() else "continuation"


def by_kind(seen: Seen, tokenizer: el.Tokenizer, target: float) -> list[Record]:
    """Depth, agreement and loss of every kind."""
    first, second = seen.half(0), seen.half(1)
    thresholds = choose_thresholds(first.margin, first.agrees, first.layers, [target])[target]
    at = emitting_exit(second.margin, thresholds)
    depth = np.asarray(second.layers)[at]
    token = np.arange(len(at))
    said = second.choice[:, -1]
    agrees = second.choice[token, at] == said
    texts = {i: tokenizer.decode([int(i)]) for i in np.unique(said)}
    kind = np.asarray([KINDS.index(kind_of(texts[i])) for i in said])

    rows = np.unique(second.row)
    place = np.searchsorted(rows, second.row)
    draws = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), DRAWS)
    found = []
    for i, name in enumerate([*KINDS, "all"]):
        of = kind == i if name != "all" else np.ones(len(kind), bool)
        if not of.any():
            continue
        weight = draws[:, place[of]]
        drawn = (weight @ depth[of]) / np.maximum(weight.sum(1), 1)
        found.append(
            {
                "kind": name,
                "tokens": int(of.sum()),
                "mean_layers": float(depth[of].mean()),
                "low": float(np.percentile(drawn[weight.sum(1) > 0], 5)),
                "high": float(np.percentile(drawn[weight.sum(1) > 0], 95)),
                "agreement": float(agrees[of].mean()),
                "shares": (np.bincount(at[of], minlength=len(seen.layers)) / of.sum()).tolist(),
                "loss": float(second.nats[of, -1].mean()),
                "agreement of every exit": second.agrees[of].mean(0).tolist(),
            }
        )
    return found


def table(cells: dict) -> str:
    """One row per kind and target."""
    rows = []
    for target, cell in cells.items():
        for one in cell["value"]:
            rows.append(
                [
                    one["kind"],
                    target,
                    one["tokens"],
                    f"{one['mean_layers']:.1f} ({one['low']:.1f}-{one['high']:.1f})",
                    " / ".join(f"{share:.2f}" for share in one["shares"]),
                    " / ".join(f"{share:.2f}" for share in one["agreement of every exit"]),
                    f"{one['agreement']:.3f}",
                    f"{one['loss']:.2f}",
                ]
            )
    header = ["kind", "target", "tokens", "mean layers", "leave at each exit, and not", "exits agree"]
    return markdown([*header, "agreement", "nats/token at full depth"], rows)


def plot(cells: dict, layers: tuple[int, ...], file: str) -> None:
    """Shares of every kind that leave at each depth, for the first target."""
    from matplotlib import pyplot

    found = next(iter(cells.values()))["value"]
    figure, axes = pyplot.subplots(figsize=(8, 4))
    left = np.zeros(len(found))
    for i, layer in enumerate(layers):
        share = np.asarray([one["shares"][i] for one in found])
        axes.barh([one["kind"] for one in found], share, left=left, label=f"{layer} layers")
        left += share
    axes.set_xlabel(f"share of the tokens, thresholds for {next(iter(cells))}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

"""Tuned exits of a real model against exits in closed form, on articles that nothing was fitted on.

COMMAND   python experiments/real_model/exits.py --hf-dir SMOLLM2 --text wikitext2.txt --out runs/real_exits
HARDWARE  two CPU cores
DURATION  about ten minutes for the pass over the text, then as long for every draw and kind
EXPECTED  README.md beside this file

For every draw, the articles of the text are divided anew into those that exits learn from and those that
they are tested on. On the former the exits of all layers are fitted (`init="fit"`) and then tuned together on
the full model's distribution (`SelfSupervisedExits`, `objective="kl"`). Coverage at 95 % is the largest share
of the test tokens that may leave, those with the largest margins first, while all tokens together still agree
with full depth on 95 %: errors among those that leave are at most 5 % of all tokens.

The model is frozen, so that one pass over the text serves all draws and kinds. It is kept in OUT and read
again; its share is counted where minutes are reported. Minutes are the seconds that both cores worked,
halved, so that other programs on the machine do not change them.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import elastic_lm as el
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.config.model import ExitKind
from elastic_lm.depth.cached_taps import READS, CachedBatches, Taps, read_taps
from elastic_lm.depth.confidence import confidence
from elastic_lm.depth.self_supervised import SelfSupervisedExits
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.sharding import make_mesh, param_shardings
from elastic_lm.quickstart.train import CANDIDATES, EPOCHS, HIDDEN
from elastic_lm.report.machine import hardware, versions
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.state import create_state, state_shardings
from elastic_lm.train.step import make_train_step

matplotlib.use("Agg")
TARGETS = (0.9, 0.95, 0.99)
HEADING = re.compile(r"(?m)^ = [^=\n]+ = *$")  # of an article of WikiText
TEST_ROWS = 4  # rows whose logits are computed at once


def main() -> None:
    """Runs every draw and kind; writes results.json and a plot, and prints the tables."""
    args = parse()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    decoder, params = load_decoder(args.hf_dir)
    pool = add_likeliest(args, decoder.config, params, read_pool(args, decoder.config, params, out), out)

    runs = []
    for draw, kind in itertools.product(args.draws, args.kinds):
        runs.append(run_draw(args, decoder.config, params, pool, kind, draw))
        result = {"args": vars(args), "hardware": hardware(), "versions": versions(), "runs": runs}
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        print(table(runs[-1:]), flush=True)

    print(table(runs))
    plot(runs, out / "exits.png")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hf-dir", required=True, help="a decoder as a Hugging Face folder")
    parser.add_argument("--text", nargs="+", required=True, help="text files with WikiText's headings")
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], help="seeds of the division")
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 20, 22, 24])
    parser.add_argument("--kinds", nargs="+", default=["linear"], choices=get_args(ExitKind))
    parser.add_argument("--pool", type=int, default=131_072, help="tokens that the draws choose from")
    parser.add_argument("--tokens", type=int, default=98_304, help="tokens that exits learn from")
    parser.add_argument("--test-tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1, help="rows of a step")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--minutes", type=float, default=10.0, help="of both cores, for fitting and tuning")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="linear: width of the MLP beside the map")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--min-lr", type=float, default=0.1)
    parser.add_argument("--schedule", default="cosine")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--b2", type=float, default=0.95)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument(
        "--candidates", type=int, default=CANDIDATES, help="columns of the vocabulary in a step"
    )
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Pool:
    """What the frozen model gives for rows of text, R of them with T tokens each.

    Attributes:
      article: [R] the article that a row is from.
      weights: [R, T] 0 for what fills up the last row of an article.
      arrays: [R, T, D] each: "features" that the vocabulary head reads, and "FIELD_LAYER" of a `Tap`.
      minutes: of both cores, for the pass over one token.
      likeliest: [R, K] tokens whose columns of the vocabulary are read; None = all.
    """

    article: np.ndarray
    weights: np.ndarray
    arrays: dict[str, np.ndarray]
    minutes: float
    likeliest: np.ndarray | None = None

    def taps(self, rows: np.ndarray, kind: ExitKind, layers: Sequence[int]) -> Taps:
        """What exits of a kind read of these rows."""
        weights = self.weights[rows]
        return Taps(
            exits=tuple({f: self.arrays[f"{f}_{layer}"][rows] for f in READS[kind]} for layer in layers),
            features=self.arrays["features"][rows],
            weights=weights,
            positions=np.tile(np.arange(weights.shape[1], dtype=np.int32), (len(rows), 1)),
            segments=(weights > 0).astype(np.int32),
            likeliest=None if self.likeliest is None else self.likeliest[rows],
        )


def read_pool(args: argparse.Namespace, config: el.ModelConfig, params: Params, out: Path) -> Pool:
    """Runs the frozen model over the text, or reads what an earlier run left in `out`."""
    kinds = {READS[kind]: kind for kind in args.kinds}
    names = sorted({f"{f}_{layer}" for fields in kinds for f in fields for layer in args.layers})
    names = ["features", *names]
    files = {name: out / "pool" / f"{name}.npy" for name in names}
    rest = out / "pool" / "rows.npz"
    if not all(file.exists() for file in (*files.values(), rest)):
        _write_pool(args, config, params, files, rest)

    rows = np.load(rest)
    arrays = {name: np.load(file, mmap_mode="r") for name, file in files.items()}
    return Pool(rows["article"], rows["weights"], arrays, float(rows["minutes"]))


def add_likeliest(
    args: argparse.Namespace, config: el.ModelConfig, params: Params, pool: Pool, out: Path
) -> Pool:
    """The pool with the tokens that steps read the columns of, where `--candidates` limits them."""
    if not args.candidates:
        return pool
    file = out / "pool" / f"likeliest_{args.candidates}_{args.rows}.npz"
    if not file.exists():
        exits = tuple(el.ExitConfig(layer, "linear", tied=True) for layer in args.layers)
        method = SelfSupervisedExits(config.with_exits(exits), candidates=args.candidates)
        sampled = jax.jit(lambda params, taps: method.sampled(params, taps).likeliest)
        began, found = time.process_time(), []
        for start in range(0, len(pool.article), args.rows):
            rows = np.minimum(np.arange(start, start + args.rows), len(pool.article) - 1)
            found.append(jax.device_get(sampled(params, pool.taps(rows, "linear", args.layers))))
        seconds = time.process_time() - began
        likeliest = np.concatenate(found)[: len(pool.article)]
        np.savez(file, likeliest=likeliest, minutes=seconds / 120 / pool.weights.sum())
    kept = np.load(file)
    return dataclasses.replace(
        pool, likeliest=kept["likeliest"], minutes=pool.minutes + float(kept["minutes"])
    )


def _write_pool(
    args: argparse.Namespace, config: el.ModelConfig, params: Params, files: dict[str, Path], rest: Path
) -> None:
    article, tokens, weights = text_rows(args)
    rest.parent.mkdir(parents=True, exist_ok=True)
    shape = (*tokens.shape, config.d_model)
    open_array = functools.partial(np.lib.format.open_memmap, mode="w+", dtype=np.float32, shape=shape)
    arrays = {name: open_array(file) for name, file in files.items()}

    kinds = {READS[kind]: kind for kind in args.kinds}.values()
    with_exits = {
        kind: config.with_exits(tuple(el.ExitConfig(layer, kind) for layer in args.layers)) for kind in kinds
    }
    run = jax.jit(lambda params, batch: {k: read_taps(c, params, batch) for k, c in with_exits.items()})

    began, rows = None, 2 * args.rows
    for start in range(0, len(tokens), rows):
        some = slice(start, start + rows)
        fill = [(0, rows - len(tokens[some])), (0, 0)]
        batch = _as_batch(np.pad(tokens[some], fill), np.pad(weights[some], fill))
        found: dict[ExitKind, Taps] = jax.device_get(run(params, batch))
        for kind, taps in found.items():
            arrays["features"][some] = taps.features[: len(tokens[some])]
            for layer, fields in zip(args.layers, taps.exits, strict=True):
                for field in READS[kind]:
                    arrays[f"{field}_{layer}"][some] = fields[field][: len(tokens[some])]
        # The first batch is compiled.
        began = began or (time.process_time(), start + rows)
        print(f"\rrows {start + rows} of {len(tokens)}", end="", flush=True)
    print()
    assert began is not None
    minutes = (time.process_time() - began[0]) / 120 / max(weights[began[1] :].sum(), 1.0)
    np.savez(rest, article=article, weights=weights, minutes=minutes)


def text_rows(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Articles of the text, cut into rows: article [R], tokens [R, T], weights [R, T]."""
    tokenizer = el.Tokenizer.load(args.hf_dir)
    texts = [Path(file).read_text(encoding="utf-8") for file in args.text]
    articles = [part for text in texts for part in split_articles(text)]
    kept, rows, total = [], [], 0
    for i, text in enumerate(articles):
        if total >= args.pool:
            break
        ids = tokenizer.encode(text)
        total += len(ids)
        for start in range(0, len(ids), args.seq_len):
            rows.append(ids[start : start + args.seq_len])
            kept.append(i)
    tokens = np.zeros((len(rows), args.seq_len), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = ids
        weights[i, : len(ids)] = 1.0
    return np.asarray(kept), tokens, weights


def split_articles(text: str) -> list[str]:
    """The articles of a file of WikiText, with their headings."""
    starts = [found.start() for found in HEADING.finditer(text)]
    return [text[a:b] for a, b in itertools.pairwise([*starts, len(text)])]


def _as_batch(tokens: np.ndarray, weights: np.ndarray) -> el.data.Batch:
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    return el.data.Batch(tokens, tokens, weights, positions, (weights > 0).astype(np.int32))


def divide(pool: Pool, draw: int, tokens: int, test_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows to test on, of different articles."""
    random = np.random.default_rng(draw)
    order = random.permutation(np.unique(pool.article))
    counts = np.asarray([pool.weights[pool.article == a].sum() for a in order]).cumsum()
    cut = int(np.searchsorted(counts, test_tokens)) + 1
    last = int(np.searchsorted(counts, counts[cut - 1] + tokens)) + 1
    test = np.flatnonzero(np.isin(pool.article, order[:cut]))
    learn = np.flatnonzero(np.isin(pool.article, order[cut:last]))
    return random.permutation(learn), test


def run_draw(
    args: argparse.Namespace,
    config: el.ModelConfig,
    params: Params,
    pool: Pool,
    kind: ExitKind,
    draw: int,
) -> dict[str, Any]:
    """The exits of one kind on one division of the articles, fitted and tuned."""
    learn, test = divide(pool, draw, args.tokens, args.test_tokens)
    count = len(learn) // args.rows
    cached = [
        pool.taps(rows, kind, args.layers) for rows in learn[: count * args.rows].reshape(count, args.rows)
    ]
    learned = float(sum(taps.weights.sum() for taps in cached))
    best = full_tokens(config, params, pool, test)

    # The closed form: an affine map alone. It is where the tuned exits start from.
    closed_kind = "linear" if "hidden" in READS[kind] else kind
    began = time.process_time()
    closed = attach(config, params, closed_kind, 0, args.layers, draw)
    closed = closed[0], el.depth.fit_exits(*closed, cached)
    fitting = (time.process_time() - began) / 120
    print(f"fitted in {60 * fitting:.0f} s of both cores", flush=True)
    before = look(*closed, pool, test, closed_kind, args.layers, best)

    tuned, start = attach(config, params, kind, args.hidden if kind == "linear" else 0, args.layers, draw)
    if kind == "linear":
        # The MLP adds nothing yet, so that the map beside it is the one of the closed form.
        start |= {e.name: start[e.name] | {"map": closed[1][e.name]["map"]} for e in tuned.exits}
    elif kind == closed_kind:
        start = closed[1]
    else:
        start = el.depth.fit_exits(tuned, start, cached)
    left = args.minutes - fitting - pool.minutes * learned

    began = time.process_time()
    steps, losses, params_after = tune(args, tuned, start, cached, left, draw)
    tuning = (time.process_time() - began) / 120
    after = look(tuned, params_after, pool, test, kind, args.layers, best)

    return {
        "draw": draw,
        "kind": kind,
        "learned_tokens": learned,
        "test_tokens": float(pool.weights[test].sum()),
        "steps": steps,
        "minutes": {"pass": pool.minutes * learned, "fitting": fitting, "tuning": tuning},
        "losses": losses,
        "closed": before,
        "tuned": after,
    }


def attach(
    config: el.ModelConfig, params: Params, kind: ExitKind, hidden: int, layers: Sequence[int], seed: int
) -> tuple[el.ModelConfig, Params]:
    """Tied exits of a kind that are still to be fitted."""
    exits = [el.ExitConfig(layer, kind, tied=True, init="fit", hidden=hidden) for layer in layers]
    return el.attach_exits(config, params, exits, jax.random.key(seed))


def tune(
    args: argparse.Namespace,
    config: el.ModelConfig,
    params: Params,
    cached: list[Taps],
    minutes: float,
    seed: int,
) -> tuple[int, list[dict[str, float]], Params]:
    """Tunes all exits together; steps done, the mean loss of every epoch, parameters."""
    mesh = make_mesh(1, 1, 1)
    params = jax.device_put(params, param_shardings(config, mesh))
    method = SelfSupervisedExits(config, top_k=args.top_k, candidates=args.candidates, seed=seed)
    trainable, frozen = method.split(params)
    trainable = jax.tree.map(jnp.copy, trainable)  # the state is donated, and the start is kept

    steps = max(2, int(args.epochs * len(cached)))
    train = el.TrainConfig(
        steps=steps,
        lr=args.lr,
        min_lr=args.min_lr,
        schedule=args.schedule,
        warmup=min(10, steps - 1),
        weight_decay=args.weight_decay,
        b2=args.b2,
    )
    optimizer = make_optimizer(train)
    step = make_train_step(method, optimizer, state_shardings(optimizer, trainable))
    state = create_state(optimizer, trainable)
    batches = CachedBatches(cached, seed)

    began, done, losses, window = time.process_time(), 0, [], []
    while done < steps and time.process_time() - began < 120 * minutes:
        state, metrics = step(state, frozen, next(batches))
        window.append({name: float(value) for name, value in metrics.items()})
        done += 1
        if done % len(cached) == 0 or done == steps:
            losses.append({name: float(np.mean([w[name] for w in window])) for name in window[0]})
            print(
                f"step {done} of {steps}, {time.process_time() - began:.0f} s of work: {losses[-1]}",
                flush=True,
            )
            window = []
    return done, losses, {**frozen, **state.params}


def full_tokens(config: el.ModelConfig, params: Params, pool: Pool, rows: np.ndarray) -> np.ndarray:
    """[R, T] the full model's likeliest tokens."""

    @jax.jit
    def best(params: Params, features: jax.Array) -> jax.Array:
        return jnp.argmax(Decoder(config).bind({"params": params}).final_logits(features), axis=-1)

    parts = [best(params, pool.arrays["features"][some]) for some in _portions(rows)]
    return np.concatenate(jax.device_get(parts))[: len(rows)]


def look(
    config: el.ModelConfig,
    params: Params,
    pool: Pool,
    rows: np.ndarray,
    kind: ExitKind,
    layers: Sequence[int],
    best: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Agreement and coverage of every exit on rows of text."""

    @functools.partial(jax.jit, static_argnames="index")
    def seen(params: Params, taps: Taps, index: int) -> tuple[jax.Array, jax.Array]:
        decoder = Decoder(config).bind({"params": params})
        features = decoder.exit_features(index, taps.tap(index), taps.positions, taps.segments)
        logits = decoder.exit_logits(index, features)
        return confidence("margin", logits), jnp.argmax(logits, axis=-1)

    found: dict[str, dict[str, float]] = {}
    counted = pool.weights[rows] > 0
    for index, layer in enumerate(layers):
        parts = [
            jax.device_get(seen(params, pool.taps(some, kind, layers), index)) for some in _portions(rows)
        ]
        margin, token = (np.concatenate([p[i] for p in parts])[: len(rows)] for i in (0, 1))
        agrees = (token == best)[counted]
        found[str(layer)] = {"agreement": float(agrees.mean())} | {
            str(target): coverage(margin[counted], agrees, target) for target in TARGETS
        }
    return found


def _portions(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows, a few at a time; the last ones are filled up with the first."""
    for start in range(0, len(rows), TEST_ROWS):
        some = rows[start : start + TEST_ROWS]
        yield np.concatenate([some, np.repeat(rows[:1], TEST_ROWS - len(some))])


def coverage(confidence: np.ndarray, agrees: np.ndarray, target: float) -> float:
    """Largest share of tokens that may leave, the surest first, with errors of at most 1 - target of all.

    Tokens of equal confidence leave together.
    """
    order = np.argsort(-confidence, kind="stable")
    errors = np.cumsum(~agrees[order])
    ends = np.append(np.diff(confidence[order]) < 0, True)
    allowed = np.flatnonzero(ends & (errors <= (1 - target) * len(agrees)))
    return float(allowed[-1] + 1) / len(agrees) if len(allowed) else 0.0


def table(runs: list[dict[str, Any]]) -> str:
    """Agreement and coverages of every draw, closed form and tuned, as Markdown."""
    lines = ["| draw | kind | layer | agreement | 90 % | 95 % | 99 % | gain at 95 % |", "|---" * 8 + "|"]
    for run in runs:
        for layer, tuned in run["tuned"].items():
            closed = run["closed"][layer]
            cells = [f"{closed[k]:.3f} / {tuned[k]:.3f}" for k in ("agreement", *map(str, TARGETS))]
            gain = tuned["0.95"] - closed["0.95"]
            lines.append(f"| {run['draw']} | {run['kind']} | {layer} | {' | '.join(cells)} | {gain:+.3f} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Coverage at 95 % against the layer, closed form and every kind; a point per draw."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    rows = {"closed form": [run["closed"] for run in runs if run["kind"] in ("linear", "block")]}
    rows |= {
        f"tuned, {kind}": [r["tuned"] for r in runs if r["kind"] == kind]
        for kind in {r["kind"] for r in runs}
    }
    for name, found in rows.items():
        if not found:
            continue
        layers = [int(layer) for layer in found[0]]
        values = np.asarray([[one[str(layer)]["0.95"] for layer in layers] for one in found])
        (line,) = axes.plot(layers, values.mean(0), label=name)
        for row in values:
            axes.plot(layers, row, ".", color=line.get_color())
    axes.set_xlabel("layer of the exit")
    axes.set_ylabel("tokens that may leave at 95 % agreement")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()

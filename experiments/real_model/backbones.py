"""A real model whose own layers learn to decide earlier: joint training with self-distillation.

COMMAND   python experiments/real_model/backbones.py --hf-dir SMOLLM2 --text train.txt --test valid.txt \\
              --out runs/real_backbones
HARDWARE  two CPU cores
DURATION  --minutes, and a few more for what is measured before and after
EXPECTED  README.md beside this file

One exit is fitted in closed form on the frozen model. Then all parameters train on the text
(`JointTraining`): full depth on the next token, the exit on what full depth says (`distil`), at a small
learning rate for the layers and a larger one for the exit. On articles that nothing was trained on: coverage
at 95 % and agreement of the exit with its own full depth, the loss of full depth on the next token, and how
often full depth still says what it said before.

Minutes are the seconds that both cores worked, halved, so that other programs do not change them.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exits import TARGETS, coverage, split_articles

import elastic_lm as el
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.depth.confidence import confidence
from elastic_lm.models.decoder import Decoder, Params, stack_layers
from elastic_lm.models.sharding import make_mesh, param_shardings, stacked_shardings
from elastic_lm.report.machine import hardware, versions
from elastic_lm.train.losses import token_losses
from elastic_lm.train.method import ParameterGroup
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.state import create_state, state_shardings
from elastic_lm.train.step import make_train_step

TEST_ROWS = 4  # rows whose logits are computed at once


def main() -> None:
    """Fits, trains and measures; writes results.json."""
    args = parse()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = el.Tokenizer.load(args.hf_dir)
    train = rows_of(args.text, tokenizer, args.seq_len, args.train_tokens, args.seed, args.rows)
    test = rows_of(args.test, tokenizer, args.seq_len, args.test_tokens, args.seed)

    decoder, params = load_decoder(args.hf_dir)
    exits = [el.ExitConfig(args.layer, "linear", tied=True, init="fit", hidden=args.hidden)]
    config, params = el.attach_exits(decoder.config, params, exits, jax.random.key(args.seed))
    fitting = [batch for batch, _ in zip(train, range(args.fit_tokens // train[0].tokens.size), strict=False)]
    params = el.depth.fit_exits(config, params, fitting)
    before = measure(config, params, test)
    print("before", json.dumps(before.report), flush=True)

    runs: list[dict[str, Any]] = []

    def report(step: int, tokens: float, minutes: float, losses: dict[str, float], params: Params) -> None:
        after = measure(config, params, test)
        same = float((after.best == before.best).mean())
        runs.append(
            {"step": step, "tokens": tokens, "minutes": minutes, "training": losses}
            | after.report
            | {"full_depth_unchanged": same}
        )
        result = {"args": vars(args), "hardware": hardware(), "versions": versions()}
        result |= {"before": before.report, "after": runs}
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(runs[-1]), flush=True)

    train_jointly(args, config, params, train, report)
    print(table(before.report, runs))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hf-dir", required=True, help="a decoder as a Hugging Face folder")
    parser.add_argument(
        "--text", nargs="+", required=True, help="files to train on, with WikiText's headings"
    )
    parser.add_argument("--test", nargs="+", required=True, help="other files of the same kind")
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the MLP beside the exit's map")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--fit-tokens", type=int, default=32_768, help="tokens that the exit is fitted on")
    parser.add_argument("--train-tokens", type=int, default=262_144, help="tokens of an epoch at most")
    parser.add_argument("--test-tokens", type=int, default=12_288)
    parser.add_argument("--steps", type=int, default=240, help="of the schedule of the learning rate")
    parser.add_argument("--minutes", type=float, default=60.0, help="of both cores, for training")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the layers")
    parser.add_argument("--exit-lr", type=float, default=10.0, help="of the exit, times that of the layers")
    parser.add_argument("--weight", type=float, default=1.0, help="of the exit's loss")
    parser.add_argument("--distil", type=float, default=1.0, help="share of full depth in the exit's loss")
    parser.add_argument("--report-every", type=int, default=80, help="steps between measurements")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def rows_of(
    files: list[str], tokenizer: el.Tokenizer, length: int, tokens: int, seed: int, rows: int = TEST_ROWS
) -> list[el.data.Batch]:
    """Batches of rows of shuffled articles; the end of an article that fills no row is left out."""
    articles = [part for file in files for part in split_articles(Path(file).read_text(encoding="utf-8"))]
    random = np.random.default_rng(seed)
    kept: list[list[int]] = []
    for i in random.permutation(len(articles)):
        ids = tokenizer.encode(articles[i])
        kept += [ids[start : start + length + 1] for start in range(0, len(ids) - length, length)]
        if len(kept) * length >= tokens:
            break
    kept = [kept[i] for i in random.permutation(len(kept))]

    batches = []
    ones = np.ones((rows, length), np.int32)
    positions = np.cumsum(ones, axis=1, dtype=np.int32) - 1
    for start in range(0, len(kept) - rows + 1, rows):
        ids = np.asarray(kept[start : start + rows], np.int32)
        batches.append(el.data.Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), positions, ones))
    return batches


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a model does on text.

    Attributes:
      report: agreement of the exit with full depth, coverages, and full depth's loss in nats per token.
      best: [N] full depth's likeliest tokens.
    """

    report: dict[str, float]
    best: np.ndarray


def measure(config: el.ModelConfig, params: Params, batches: list[el.data.Batch]) -> Measured:
    """Measures the one exit of a model, and its full depth."""
    parts = [jax.device_get(_look(config, params, batch)) for batch in batches]
    margin, token, best, loss = (np.concatenate([part[i].ravel() for part in parts]) for i in range(4))
    agrees = token == best
    report = {"agreement": float(agrees.mean()), "loss": float(loss.mean())}
    report |= {str(target): coverage(margin, agrees, target) for target in TARGETS}
    return Measured(report, best)


@functools.partial(jax.jit, static_argnames="config")
def _look(config: el.ModelConfig, params: Params, batch: el.data.Batch) -> tuple[jax.Array, ...]:
    """Margin and token of the exit, token and loss of full depth: [B, T] each."""
    output = Decoder(config).apply({"params": params}, batch.tokens, batch.positions, batch.segments)
    (exit_logits,) = output.exit_logits
    return (
        confidence("margin", exit_logits),
        jnp.argmax(exit_logits, axis=-1),
        jnp.argmax(output.logits, axis=-1),
        token_losses(output.logits, batch.targets).cross_entropy,
    )


def train_jointly(
    args: argparse.Namespace,
    config: el.ModelConfig,
    params: Params,
    batches: list[el.data.Batch],
    report: Callable[[int, float, float, dict[str, float], Params], None],
) -> None:
    """Trains all parameters, and calls `report` on the way and at the end."""
    mesh = make_mesh(1, 1, 1)
    params = jax.device_put(stack_layers(params), stacked_shardings(param_shardings(config, mesh)))
    method = el.depth.JointTraining(config, weights=(args.weight,), distil=args.distil)
    trainable, frozen = method.split(params)
    del params

    train = el.TrainConfig(steps=args.steps, lr=args.lr, warmup=min(10, args.steps - 1), weight_decay=0.0)
    own = ParameterGroup((config.exits[0].name,), args.exit_lr)
    optimizer = make_optimizer(train, [own])
    step = make_train_step(method, optimizer, state_shardings(optimizer, trainable))
    state = create_state(optimizer, trainable)
    del trainable

    seconds, tokens, window = 0.0, 0.0, []
    for done, batch in enumerate(_in_turns(batches, args.steps), 1):
        began = time.process_time()
        state, metrics = step(state, frozen, batch)
        window.append({name: float(value) for name, value in metrics.items()})
        seconds, tokens = seconds + time.process_time() - began, tokens + float(batch.weights.sum())
        last = done == args.steps or seconds > 120 * args.minutes
        if last or done % args.report_every == 0:
            losses = {name: float(np.mean([w[name] for w in window])) for name in window[0]}
            report(done, tokens, seconds / 120, losses, state.params)
            window = []
        if last:
            return


def _in_turns(batches: list[el.data.Batch], steps: int) -> Iterator[el.data.Batch]:
    """Batches over and over."""
    for step in range(steps):
        yield batches[step % len(batches)]


def table(before: dict[str, float], runs: list[dict[str, Any]]) -> str:
    """Everything measured, as Markdown."""
    lines = [
        "| tokens seen | agreement | coverage at 90 / 95 / 99 % | full depth's loss | full depth unchanged |",
        "|---" * 5 + "|",
    ]
    for run in [{"tokens": 0, "full_depth_unchanged": 1.0, **before}, *runs]:
        covered = " / ".join(f"{run[str(target)]:.3f}" for target in TARGETS)
        lines.append(
            f"| {run['tokens']:,.0f} | {run['agreement']:.3f} | {covered} | {run['loss']:.3f} | "
            f"{run['full_depth_unchanged']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

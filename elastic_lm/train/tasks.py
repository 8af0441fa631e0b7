"""A run that learns a task: model, head, labelled records, loop, and the finished model on disk."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from elastic_lm.checkpoint import Checkpoints, check_target, local_folder, save_model
from elastic_lm.data import labelled, pairs
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.encoder_config import EncoderConfig
from elastic_lm.encoder_decoder_config import EncoderDecoderConfig
from elastic_lm.loading import load
from elastic_lm.methods.sequence_to_sequence import PairBatch, SequenceToSequence, Teacher
from elastic_lm.methods.task_tuning import TEACHER, TaskBatch, TaskTuning
from elastic_lm.models import kinds
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

Config = TypeVar("Config")
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A task's model, at step 0, and its data.

    Attributes:
      config: of the model.
      params: its parameters, and those of a teacher where `method` looks for them, on the mesh.
      method: a `losses.Method` of batches of the class `batch`.
      batch: what arrays of the datasets become.
      train: endless batches.
      held_out: makes one pass over the held-out records.
    """

    config: EncoderConfig | EncoderDecoderConfig
    params: Params
    method: Any
    batch: type
    train: grain.IterDataset
    held_out: Callable[[], Iterable[Any]]


def fit_task(run: TaskRun, workdir: str | Path) -> tuple[Any, Params, dict[str, float]]:
    """Trains what `run` describes; run again after a stop, it continues where it was.

    Args:
      run: the whole run.
      workdir: folder for a learned tokenizer, checkpoints, metrics.jsonl and the finished model/.

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
    tokenizer = prepare_tokenizer(run, workdir)
    make = prepare_writer if run.task.problem == "text_to_text" else prepare_classifier
    task = make(run, tokenizer, mesh)
    trainable, frozen = task.method.split(task.params)
    optimizer = make_optimizer(train)
    places = state_shardings(optimizer, trainable)
    place = functools.partial(place_records, task.batch)
    job = loop.Job(
        config=train,
        mesh=mesh,
        train_step=make_train_step(task.method, optimizer, places, train.accumulate),
        eval_step=make_eval_step(dataclasses.replace(task.method, teacher=None, distil=0.0, z_loss=0.0)),
        held_out=task.held_out if run.task.eval_paths else lambda: (),
        per_step=run.task.batch_size,
        place=place,
        place_held_out=place,
        rate="records_per_s",
    )
    save_identity(run, workdir)
    batches: Any = iter(task.train)
    with closing(Checkpoints(workdir / "checkpoints", train.keep)) as checkpoints:
        start, state = loop.resume(checkpoints, create_state(optimizer, trainable), batches)
        with closing(make_writer(workdir, train.steps, start)) as writer:
            state, metrics = loop.run(job, start, state, frozen, batches, checkpoints, writer)
    whole = {**{name: tree for name, tree in frozen.items() if name != TEACHER}, **state.params}
    save_model(workdir / MODEL_FOLDER, task.config, whole, tokenizer, overwrite=True)
    return task.config, whole, metrics


def prepare_tokenizer(run: TaskRun, workdir: Path) -> Tokenizer:
    """The configured tokenizer, that of the initial checkpoint, or a BPE learned from both texts of pairs.

    A learned one is kept in `workdir`, so a resumed run reads the same ids.
    """
    if source := run.task.tokenizer or run.train.init_from:
        return Tokenizer.load(source)
    assert run.encoder_decoder is not None
    if not (workdir / "tokenizer.json").is_file():
        train_bpe(pairs.pair_texts(run.task), run.encoder_decoder.vocab_size).save(workdir)
    return Tokenizer.load(workdir)


def prepare_classifier(run: TaskRun, tokenizer: Tokenizer, mesh: Mesh) -> Prepared:
    """An encoder with a head for classes or a number, or a head on the encoder of an encoder-decoder."""
    labels = labelled.classes(run.task)
    config, params = prepare_encoder(run, tokenizer, labels, mesh)
    method, params = with_teacher(run, config, params, mesh)
    data = run.task, tokenizer, labels, config.pad_id
    held_out = functools.partial(labelled.eval_batches, *data)
    return Prepared(config, params, method, TaskBatch, labelled.train_batches(*data), held_out)


def prepare_writer(run: TaskRun, tokenizer: Tokenizer, mesh: Mesh) -> Prepared:
    """An encoder-decoder that writes a text for every record.

    Raises:
      FileNotFoundError: the initial checkpoint or the teacher does not exist.
      ValueError: one of them is no encoder-decoder, or vocabularies do not fit.
    """
    train, kind = run.train, EncoderDecoderConfig
    if run.encoder_decoder is not None:
        config = dataclasses.replace(run.encoder_decoder, eos_ids=tokenizer.eos_ids)
        params = kinds.init_params(config, jax.random.key(train.seed))
    else:
        config, params = load_of(kind, "train.init_from", train.init_from, train.param_dtype or None, mesh)
    check_vocabulary(tokenizer, config.vocab_size)
    config = dataclasses.replace(config, dtype=train.dtype or config.dtype)
    options = {"distil": train.distil, "temperature": train.temperature, "z_loss": train.z_loss}
    teacher = None
    if train.teacher_from:
        teacher = Teacher(*load_of(kind, "train.teacher_from", train.teacher_from, None, mesh))
    method = SequenceToSequence(config, teacher, **options, chunk=train.loss_chunk)
    params = jax.device_put(params, param_shardings(config, mesh))
    data = run.task, config, tokenizer
    held_out = functools.partial(pairs.eval_pairs, *data)
    return Prepared(config, params, method, PairBatch, pairs.train_pairs(*data), held_out)


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
        dtype = train.param_dtype or None
        config, params = load_of(EncoderConfig, "train.init_from", train.init_from, dtype, mesh)
        if train.init_layers:
            config, params = lowest_layers(config, params, train.init_layers)
    check_vocabulary(tokenizer, config.vocab_size)
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
    teacher, given = load_of(EncoderConfig, "train.teacher_from", train.teacher_from, None, mesh)
    answers = (teacher.problem, teacher.n_labels, teacher.labels)
    fix = f"answers {answers}, not {(config.problem, config.n_labels, config.labels)}; tune it on the task"
    same = answers == (config.problem, config.n_labels, config.labels)
    require(same, "train.teacher_from", train.teacher_from, fix)
    fix = f"reads {teacher.vocab_size} token ids, not {config.vocab_size}: both models need one tokenizer"
    require(teacher.vocab_size == config.vocab_size, "train.teacher_from", train.teacher_from, fix)
    return TaskTuning(config, teacher, **options), {**params, TEACHER: given}


def load_of(
    kind: type[Config], field: str, folder: str, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[Config, Params]:
    """A model of one kind from its folder.

    Args:
      kind: class of its config.
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
    found, wanted = (name.removesuffix("Config") for name in (type(config).__name__, kind.__name__))
    require(isinstance(config, kind), field, folder, f"holds a {found}, where an {wanted} is needed")
    return config, params


def check_vocabulary(tokenizer: Tokenizer, size: int) -> None:
    """Refuses a tokenizer with more ids than the model has embeddings."""
    fix = f"the tokenizer has more ids ({tokenizer.vocab_size}): name the one that belongs to the model"
    require(tokenizer.vocab_size <= size, "model.vocab_size", size, fix)


def place_records(batch: type, arrays: Mapping[str, np.ndarray], mesh: Mesh) -> Any:
    """Puts a host batch on the mesh, rows over data and fsdp."""
    sharding = batch_sharding(mesh)
    placed = {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}
    return batch(**placed)


def _check_rows(run: TaskRun, mesh: Mesh) -> None:
    parts, rows = mesh.shape["data"] * mesh.shape["fsdp"] * run.train.accumulate, run.task.batch_size
    fix = f"must be a multiple of {parts}, the devices that hold different rows times train.accumulate"
    require(rows % parts == 0, "task.batch_size", rows, fix)

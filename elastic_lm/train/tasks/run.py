"""A run that learns a task: model, head, labelled records, loop, and the finished model on disk."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from elastic_lm.checkpoints.loading import load
from elastic_lm.checkpoints.native import Checkpoints, check_target, local_folder, save_model
from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.data import labelled, pairs
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.models import registry as kinds
from elastic_lm.models.sharding import batch_sharding, make_mesh, param_shardings
from elastic_lm.train import loop
from elastic_lm.train.config import TaskRun
from elastic_lm.train.identity import check_identity, save_identity
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.run import MODEL_FOLDER, make_writer
from elastic_lm.train.state import create_state, state_shardings
from elastic_lm.train.step import make_eval_step, make_train_step
from elastic_lm.train.tasks.models import check_vocabulary, load_of, prepare_model, with_teacher
from elastic_lm.train.tasks.seq2seq import PairBatch, SequenceToSequence, Teacher
from elastic_lm.train.tasks.tuning import TEACHER, TaskBatch

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
        if not run.task.tokenizer and not Path(source).is_dir():
            load(source)  # says how to get a model
        return Tokenizer.load(source)
    assert run.encoder_decoder is not None
    if not (workdir / "tokenizer.json").is_file():
        train_bpe(pairs.pair_texts(run.task), run.encoder_decoder.vocab_size).save(workdir)
    return Tokenizer.load(workdir)


def prepare_classifier(run: TaskRun, tokenizer: Tokenizer, mesh: Mesh) -> Prepared:
    """An encoder with a head for classes or a number, or a head on the encoder of an encoder-decoder."""
    labels = labelled.classes(run.task)
    config, params = prepare_model(run, tokenizer, labels, mesh)
    method, params = with_teacher(run.train, config, params, mesh)
    reads = config if isinstance(config, EncoderDecoderConfig) else None
    data = run.task, tokenizer, labels, config.pad_id, reads
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


def place_records(batch: type, arrays: Mapping[str, np.ndarray], mesh: Mesh) -> Any:
    """Puts a host batch on the mesh, rows over data and fsdp."""
    sharding = batch_sharding(mesh)
    placed = {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}
    return batch(**placed)


def _check_rows(run: TaskRun, mesh: Mesh) -> None:
    parts, rows = mesh.shape["data"] * mesh.shape["fsdp"] * run.train.accumulate, run.task.batch_size
    fix = f"must be a multiple of {parts}, the devices that hold different rows times train.accumulate"
    require(rows % parts == 0, "task.batch_size", rows, fix)

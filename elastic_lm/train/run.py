"""A training run from its config: model, data and method, the loop, and the finished model on disk."""

import dataclasses
import logging
from contextlib import closing
from pathlib import Path
from typing import overload

import jax

from elastic_lm.checkpoints.native import Checkpoints, check_target, local_folder, save_model
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.models.decoder import Params
from elastic_lm.models.registry import Config
from elastic_lm.models.sharding import make_mesh
from elastic_lm.report.writers import JsonlWriter, ProgressWriter, TensorBoardWriter, Writer, Writers
from elastic_lm.train import loop
from elastic_lm.train.config import RunConfig, TaskRun
from elastic_lm.train.identity import check_identity, save_identity
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.prepared import Prepared
from elastic_lm.train.state import create_state, state_shardings
from elastic_lm.train.step import make_eval_step, make_train_step
from elastic_lm.train.tasks.run import prepare_task
from elastic_lm.train.text import prepare_text

MODEL_FOLDER = "model"


@overload
def fit(config: RunConfig, workdir: str | Path) -> tuple[ModelConfig, Params, dict[str, float]]: ...


@overload
def fit(
    config: TaskRun, workdir: str | Path
) -> tuple[EncoderConfig | EncoderDecoderConfig, Params, dict[str, float]]: ...


@overload
def fit(config: RunConfig | TaskRun, workdir: str | Path) -> tuple[Config, Params, dict[str, float]]: ...


def fit(config: RunConfig | TaskRun, workdir: str | Path) -> tuple[Config, Params, dict[str, float]]:
    """Trains what `config` describes; run again after a stop, it continues where it was.

    Args:
      config: the whole run, of a decoder on text or of a task on labelled records.
      workdir: folder for the tokenizer, checkpoints, metrics.jsonl and the finished model/.

    Returns:
      (model config, canonical parameters, metrics of the last held-out evaluation).

    Raises:
      FileNotFoundError: data, tokenizer, initial checkpoint or teacher do not exist.
      FloatingPointError: training diverged; names the step.
      ValueError: a file or field is unusable, or `workdir` is remote or holds another run; names it.

    Example:
      ```python
      import tempfile

      import elastic_lm as el

      run = el.RunConfig(
          model=el.testing.tiny_config(vocab_size=300),
          data=el.DataConfig(source="stdlib", seq_len=32, batch_size=2),
          train=el.TrainConfig(steps=2, warmup=1, eval_batches=1),
      )
      with tempfile.TemporaryDirectory() as workdir:
          model, params, metrics = el.train.fit(run, workdir)
      ```
    """
    workdir = local_folder(workdir)
    check_identity(config, workdir)
    check_target(workdir / MODEL_FOLDER, overwrite=True)

    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    prepare = prepare_task if isinstance(config, TaskRun) else prepare_text
    run: Prepared = prepare(config, workdir, mesh)  # pyright: ignore[reportArgumentType]
    method, data = run.method, run.data

    trainable, frozen = method.split(run.params)
    # What trains is donated step by step: nothing else may hold on to it.
    run = dataclasses.replace(run, params={})

    optimizer = make_optimizer(config.train, method.parameter_groups())
    shardings = state_shardings(optimizer, trainable)
    job = loop.Job(
        config=config.train,
        train_step=make_train_step(method, optimizer, shardings, config.train.accumulate),
        eval_step=make_eval_step(method.for_evaluation()),
        held_out=data.held_out,
        place=lambda batch: data.place(batch, data.mesh),
        per_step=run.per_step,
        rate=run.rate,
        remark=method.remark,
    )

    batches = method.batches(iter(data.train), frozen, data)
    data = dataclasses.replace(data, read=batches)
    state = create_state(optimizer, trainable)
    del trainable
    save_identity(config, workdir)  # only now: a run that was refused leaves no trace in its workdir

    with closing(Checkpoints(workdir / "checkpoints", config.train.keep)) as checkpoints:
        start, state = loop.resume(checkpoints, state, batches)
        if not start:
            state = method.begin(state, frozen, data)
        with closing(make_writer(workdir, config.train.steps, start)) as writer:
            state, metrics = loop.run(
                job, start, state, frozen, batches=batches, checkpoints=checkpoints, writer=writer
            )

    finished = method.finish({**frozen, **state.params}, data)
    params = run.canonical(finished.params)
    save_model(
        workdir / MODEL_FOLDER,
        method.config,
        params,
        run.tokenizer,
        menu=finished.menu or run.menu,
        source=config.train.init_from or None,
        beside=finished.beside,
        overwrite=True,
    )
    return method.config, params, metrics


def make_writer(workdir: Path, steps: int, start: int) -> Writer:
    """Progress and metrics.jsonl, and TensorBoard files where tensorboardX is installed.

    Args:
      workdir: metrics.jsonl and tensorboard/ go here.
      steps: of the whole run.
      start: steps done before; lines of later steps are dropped.

    Returns:
      The writer; it writes nothing in any process but the first.
    """
    if jax.process_index():
        return Writers(())

    writers: list[Writer] = [ProgressWriter(steps, start), JsonlWriter(workdir / "metrics.jsonl", start)]
    try:
        writers.append(TensorBoardWriter(workdir / "tensorboard"))
    except ImportError:
        logging.debug("tensorboardX is not installed: no TensorBoard files")
    return Writers(writers)

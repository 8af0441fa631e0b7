"""A training run from its config: model, data and method, the loop, and the finished model on disk."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from elastic_lm.checkpoints.native import Checkpoints, check_target, save_model
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import to_dict
from elastic_lm.files.checksums import write_checksums
from elastic_lm.files.local import local_path
from elastic_lm.files.locks import LOCK_FILE, only_process
from elastic_lm.hf.carried import Carried
from elastic_lm.models.decoder import Params
from elastic_lm.models.finite import check_finite
from elastic_lm.models.registry import Config
from elastic_lm.models.sharding import make_mesh
from elastic_lm.nn.kernels import choose
from elastic_lm.report.machine import peak_memory_bytes
from elastic_lm.report.writers import ProgressWriter, Writer, Writers, check_writers, make_writers
from elastic_lm.train import loop
from elastic_lm.train.config import RunConfig, TaskRun, with_seeds
from elastic_lm.train.identity import check_identity, save_identity
from elastic_lm.train.inputs import check_inputs, run_inputs, save_inputs
from elastic_lm.train.optim import learning_rate, make_optimizer
from elastic_lm.train.prepared import Prepared
from elastic_lm.train.record import UNKNOWN, Origin, opening, save_record
from elastic_lm.train.state import cast_params, create_state, state_shardings
from elastic_lm.train.step import make_eval_step, make_train_step
from elastic_lm.train.tasks.run import prepare_task
from elastic_lm.train.text import prepare_text

MODEL_FOLDER = "model"


@overload
def fit(
    config: RunConfig,
    workdir: str | Path,
    *,
    stop: Callable[[], bool] | None = None,
    writers: Sequence[Writer] = (),
    origin: Origin = UNKNOWN,
) -> tuple[ModelConfig, Params, dict[str, float]]: ...


@overload
def fit(
    config: TaskRun,
    workdir: str | Path,
    *,
    stop: Callable[[], bool] | None = None,
    writers: Sequence[Writer] = (),
    origin: Origin = UNKNOWN,
) -> tuple[EncoderConfig | EncoderDecoderConfig, Params, dict[str, float]]: ...


@overload
def fit(
    config: RunConfig | TaskRun,
    workdir: str | Path,
    *,
    stop: Callable[[], bool] | None = None,
    writers: Sequence[Writer] = (),
    origin: Origin = UNKNOWN,
) -> tuple[Config, Params, dict[str, float]]: ...


def fit(
    config: RunConfig | TaskRun,
    workdir: str | Path,
    *,
    stop: Callable[[], bool] | None = None,
    writers: Sequence[Writer] = (),
    origin: Origin = UNKNOWN,
) -> tuple[Config, Params, dict[str, float]]:
    """Trains what `config` describes; run again after a stop, it continues where it was.

    Args:
      config: the whole run, of a decoder on text or of a task on labelled records.
      workdir: folder for the tokenizer, checkpoints, metrics.jsonl and the finished model/.
      stop: asked after every step but the last: whether to save and stop there; None = never.
      writers: receive the numbers of the run, beside those that `log.writers` names; each has
        `write(step, values)` and `close()`, which is called at the end. The first process alone writes.
      origin: where the config comes from, to be recorded.

    Returns:
      (model config, canonical parameters, metrics of the last held-out evaluation).

    Raises:
      FileNotFoundError: data, tokenizer, initial checkpoint or teacher do not exist.
      FloatingPointError: training diverged; names the step.
      OSError: the disk takes no more; names the file.
      Stopped: `stop` asked for it; the state is saved.
      ValueError: a file or field is unusable, `workdir` is remote, holds another run, or is in use by another
        process, or the initial checkpoint or the data changed since the run there began; names it.

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
    workdir = local_path(workdir)
    first = jax.process_index() == 0
    fix = "choose another workdir"
    with only_process(workdir / LOCK_FILE, workdir, fix) if first else nullcontext():
        return _fit(config, workdir, stop or (lambda: False), writers, origin)


def _fit(
    given: RunConfig | TaskRun,
    workdir: Path,
    stop: Callable[[], bool],
    writers: Sequence[Writer],
    origin: Origin,
) -> tuple[Config, Params, dict[str, float]]:
    """`fit` in a workdir that no other process uses."""
    config = with_seeds(given)
    check_writers(config.log)
    check_identity(config, workdir)
    check_target(workdir / MODEL_FOLDER, overwrite=True)

    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, sequence=config.mesh.sequence)
    kernel = choose(config.train.attention, mesh)
    prepare = prepare_task if isinstance(config, TaskRun) else prepare_text
    if config.train.init_from:
        # Read at the end as well; here nothing is lost where it fails.
        Carried.of_folder(config.train.init_from)
    run: Prepared = prepare(config, workdir, mesh)  # pyright: ignore[reportArgumentType]
    method, data = run.method, run.data
    inputs = run_inputs(config, run)
    check_inputs(config, inputs, workdir)

    trainable, frozen = method.split(run.params)
    # What trains is donated step by step: nothing else may hold on to it.
    run = dataclasses.replace(run, params={})

    optimizer = make_optimizer(config.train, method.parameter_groups())
    shardings = state_shardings(optimizer, trainable)
    job = loop.Job(
        config=config.train,
        train_step=make_train_step(method, optimizer, shardings, config.train.accumulate, kernel),
        eval_step=make_eval_step(method.for_evaluation(), mesh, kernel),
        held_out=data.held_out,
        place=lambda batch: data.place(batch, data.mesh),
        per_step=run.per_step,
        rate=run.rate,
        remark=method.remark,
        extra=functools.partial(extra_numbers, learning_rate(config.train)),
        dtype=method.config.dtype,
        stop=stop,
    )

    batches = method.batches(iter(data.train), frozen, data)
    data = dataclasses.replace(data, read=batches)
    state = create_state(optimizer, trainable, config.train.param_dtype or "float32")
    del trainable
    # Only now: a run that was refused leaves no trace in its workdir.
    save_files(config, run, inputs, workdir)

    with closing(Checkpoints(workdir / "checkpoints", config.train.keep)) as checkpoints:
        start, state = loop.resume(checkpoints, state, batches)
        if not start:
            state = method.begin(state, frozen, data)
        if not jax.process_index():
            save_record(given, origin, mesh, start, workdir)
            print(opening(mesh, state.params, frozen, config.train.mu_dtype, config.train.nu_dtype))
            print("compiling; the first step takes longest", flush=True)
        with closing(make_writer(given, workdir, start, writers)) as writer:
            state, metrics = loop.run(
                job, start, state, frozen, batches=batches, checkpoints=checkpoints, writer=writer
            )

    finished = method.finish({**frozen, **state.params}, data)
    model, params = as_stored(config, method.config, run.canonical(finished.params))
    save_model(
        workdir / MODEL_FOLDER,
        model,
        params,
        run.tokenizer,
        menu=finished.menu or run.menu,
        source=config.train.init_from or None,
        beside=finished.beside,
        overwrite=True,
    )
    return model, params, metrics


def save_files(config: RunConfig | TaskRun, run: Prepared, inputs: dict[str, Any], workdir: Path) -> None:
    """Writes what a run that goes on is compared with; one process does, and the others wait for it.

    Args:
      config: the whole run.
      run: its tokenizer is written where it was learned.
      inputs: from `run_inputs`.
      workdir: of the run; made where it is missing.
    """
    if not jax.process_index():
        if run.learned:
            run.tokenizer.save(workdir)
            write_checksums(workdir, ("tokenizer.json", "tokenizer_config.json"))
        save_identity(config, workdir)
        save_inputs(inputs, workdir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the files of the run")


def as_stored(config: RunConfig | TaskRun, model: Config, params: Params) -> tuple[Config, Params]:
    """A trained model as it is saved.

    A new model has the dtype that its config names. Of another, what trained keeps its float32: rounded to
    the file's dtype, a short run would lose most of what it has learned. Frozen weights are the file's.

    Args:
      config: the run.
      model: the trained model.
      params: its canonical parameters.

    Returns:
      (the model with the dtype of its parameters, where all have the same; parameters).
    """
    new = [config.model] if isinstance(config, RunConfig) else [config.encoder, config.encoder_decoder]
    if not config.train.init_from:
        params = cast_params(params, next(m.param_dtype for m in new if m is not None))
        check_finite("the trained model in train.param_dtype", params)

    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    if len(dtypes) == 1:
        model = dataclasses.replace(model, param_dtype=dtypes.pop())
    return model, params


def extra_numbers(rate: optax.Schedule, step: int) -> dict[str, float]:
    """The learning rate of a step, and the most memory that the run has taken until then.

    Args:
      rate: learning rate by steps done.
      step: the step, counted from 1.
    """
    memory = peak_memory_bytes()
    there = {} if memory is None else {"peak_memory_gib": memory / 2**30}
    return {"lr": float(np.asarray(rate(step - 1))), **there}


def make_writer(
    config: RunConfig | TaskRun, workdir: Path, start: int, more: Sequence[Writer] = ()
) -> Writer:
    """Progress in the terminal, and the writers that the run names.

    Args:
      config: the whole run.
      workdir: metrics.jsonl and tensorboard/ go here.
      start: steps done before; lines of later steps are dropped.
      more: further writers.

    Returns:
      The writer; it writes nothing in any process but the first.
    """
    if jax.process_index():
        return Writers(())

    named = make_writers(config.log, workdir, to_dict(config), start)
    return Writers([ProgressWriter(config.train.steps, start), *named, *more])

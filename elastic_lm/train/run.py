"""A training run from its config: model, data and method, the loop, and the finished model on disk."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
import optax

from elastic_lm.checkpoints.native import Checkpoints, check_target, save_model
from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import to_dict
from elastic_lm.files.checksums import write_checksums
from elastic_lm.files.locks import LOCK_FILE, only_process
from elastic_lm.files.remote import check_direct
from elastic_lm.files.remote_workdirs import flush, refresh, stored_at, working_folder
from elastic_lm.files.subnet_files import has_subnets, load_subnets
from elastic_lm.hf.carried import Carried
from elastic_lm.models.decoder import Params
from elastic_lm.models.exits import extract
from elastic_lm.models.finite import check_finite
from elastic_lm.models.registry import Config
from elastic_lm.models.sharding import make_mesh
from elastic_lm.nn.kernels import choose
from elastic_lm.processes import all_or_none, bytes_of_all, is_first
from elastic_lm.report.machine import peak_memory_bytes
from elastic_lm.report.writers import ProgressWriter, Writer, Writers, check_writers, make_writers
from elastic_lm.train import loop
from elastic_lm.train.config import RunConfig, TaskRun, with_seeds
from elastic_lm.train.goodput import Goodput
from elastic_lm.train.identity import FILE as RUN_FILE
from elastic_lm.train.identity import check_identity, save_identity
from elastic_lm.train.inputs import check_inputs, run_inputs, save_inputs
from elastic_lm.train.left_model import is_left, note_left
from elastic_lm.train.method import Finished, RunData
from elastic_lm.train.optim import learning_rate, make_optimizer
from elastic_lm.train.prepared import Prepared
from elastic_lm.train.profiling import Profile, check_profile
from elastic_lm.train.record import UNKNOWN, Origin, opening, save_record
from elastic_lm.train.state import cast_params, create_state, state_shardings
from elastic_lm.train.step import make_eval_step, make_train_step
from elastic_lm.train.tasks.run import prepare_task
from elastic_lm.train.text import prepare_text
from elastic_lm.train.together import noticing_lost_processes
from elastic_lm.train.utilization import Utilization

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
      workdir: folder for the tokenizer, checkpoints, metrics.jsonl and the finished model/; it may be at
        gs://.
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
      ValueError: a file or field is unusable, `workdir` is in another store, holds another run, or is in use
        by another process, or the initial checkpoint or the data changed since the run there began; names it.

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
    check_direct(workdir)
    fix = "choose another workdir"
    with ExitStack() as held, noticing_lost_processes():
        with all_or_none():
            folder = held.enter_context(working_folder(workdir, is_first(), fix))
            if is_first():
                held.enter_context(only_process(folder / LOCK_FILE, workdir, fix))
        check_same_run(config, workdir)
        return _fit(config, folder, stop or (lambda: False), writers, origin)


def _fit(
    given: RunConfig | TaskRun,
    workdir: Path,
    stop: Callable[[], bool],
    writers: Sequence[Writer],
    origin: Origin,
) -> tuple[Config, Params, dict[str, float]]:
    """`fit` in a workdir that no other process uses."""
    goodput = Goodput()
    config = with_seeds(given)
    with all_or_none():
        check_writers(config.log)
        check_profile(config.log.profile, config.train.steps)
        check_identity(config, workdir)
        check_target(stored_at(workdir / MODEL_FOLDER), overwrite=True)

        mesh = make_mesh(
            config.mesh.data, config.mesh.fsdp, config.mesh.tensor, sequence=config.mesh.sequence
        )
        kernel = choose(config.train.attention, mesh)
        if config.train.init_from:
            # Read at the end as well; here nothing is lost where it fails.
            Carried.of_folder(config.train.init_from)
            if has_subnets(config.train.init_from):
                load_subnets(config.train.init_from)
    prepare = prepare_task if isinstance(config, TaskRun) else prepare_text
    run: Prepared = prepare(config, workdir, mesh)  # pyright: ignore[reportArgumentType]
    method, data = run.method, run.data
    inputs = run_inputs(config, run)
    with all_or_none():
        check_inputs(config, inputs, workdir)

    trainable, frozen = method.split(run.params)
    # What trains is donated step by step: nothing else may hold on to it.
    run = dataclasses.replace(run, params={})

    optimizer = make_optimizer(config.train, method.parameter_groups())
    shardings = state_shardings(optimizer, trainable)
    used = Utilization(mesh, run.rate, config.log.peak_tflops)
    job = loop.Job(
        config=config.train,
        train_step=used.counting(
            make_train_step(method, optimizer, shardings, config.train.accumulate, kernel)
        ),
        eval_step=make_eval_step(method.for_evaluation(), mesh, kernel),
        held_out=data.held_out,
        place=lambda batch: data.place(batch, data.mesh),
        per_step=run.per_step,
        rate=run.rate,
        remark=method.remark,
        extra=functools.partial(extra_numbers, learning_rate(config.train), used),
        dtype=method.config.dtype,
        stop=stop,
        goodput=goodput,
    )

    batches = method.batches(iter(data.train), frozen, data)
    data = dataclasses.replace(data, read=batches)
    state = create_state(optimizer, trainable, config.train.param_dtype or "float32")
    del trainable
    # Only now: a run that was refused leaves no trace in its workdir.
    save_files(config, run, inputs, workdir)

    kept = (config.train.keep, config.train.keep_period)
    with Checkpoints(stored_at(workdir / "checkpoints"), *kept) as checkpoints, noticing_lost_processes():
        start, state = loop.resume(checkpoints, state, batches)
        if not start:
            state = method.begin(state, frozen, data)
        if is_first():
            save_record(given, origin, mesh, start, workdir)
            print(opening(mesh, state.params, frozen, config.train.mu_dtype, config.train.nu_dtype))
            print("compiling; the first step takes longest", flush=True)
        profile = Profile(config.log.profile, workdir, start, config.train.steps)
        job = dataclasses.replace(job, profile=profile)
        goodput.ready(None if jax.process_index() else workdir, start)
        with (
            closing(make_writer(given, workdir, start, writers)) as writer,
            goodput.until_end(writer),
            closing(profile),
        ):
            state, metrics = loop.run(
                job, start, state, frozen, batches=batches, checkpoints=checkpoints, writer=writer
            )

    target = stored_at(workdir / MODEL_FOLDER)
    again = start == config.train.steps and is_left(workdir, target, start)
    trained = {**frozen, **state.params}
    model, params = save_finished(config, run, trained, data, None if again else target)
    note_left(workdir, target, config.train.steps)
    return model, params, metrics


def save_finished(
    config: RunConfig | TaskRun,
    run: Prepared,
    params: Params,
    data: RunData,
    target: Path | None,
    *,
    backbone: bool = False,
    overwrite: bool = True,
) -> tuple[Config, Params]:
    """Writes what a run leaves: the model, and what its method puts beside it.

    Args:
      config: the whole run.
      run: the run at step 0.
      params: all parameters after its steps, in the form that they train in.
      data: what the run reads.
      target: folder of the model; None = it is there already, and nothing is written.
      backbone: without exits, and without what the method puts beside the model.
      overwrite: replace an earlier model at `target`.

    Returns:
      (model config, canonical parameters), as they were saved.
    """
    finished = run.method.finish(params, data)
    model, params = as_stored(config, run.method.config, run.canonical(finished.params))
    if backbone and isinstance(model, ModelConfig):
        model, params = extract(model, params, model.n_layers)
        finished = Finished(params)
    if target is not None:
        save_model(
            target,
            model,
            params,
            run.tokenizer,
            menu=finished.menu or run.menu,
            source=config.train.init_from or None,
            beside=finished.beside,
            overwrite=overwrite,
        )
    return model, params


def save_files(config: RunConfig | TaskRun, run: Prepared, inputs: dict[str, Any], workdir: Path) -> None:
    """Writes what a run that goes on is compared with; one process does, and the others wait for it.

    Args:
      config: the whole run.
      run: its tokenizer is written where it was learned.
      inputs: from `run_inputs`.
      workdir: of the run; made where it is missing.
    """
    with all_or_none():
        if is_first():
            if run.learned:
                run.tokenizer.save(workdir)
                write_checksums(workdir, ("tokenizer.json", "tokenizer_config.json"))
            save_identity(config, workdir)
            save_inputs(inputs, workdir)
            flush(workdir)
    with all_or_none():
        refresh(workdir)
        fix = "is another folder in this process than in the first one; name one that all processes see"
        require((workdir / RUN_FILE).is_file(), "workdir", str(workdir), fix)


def check_same_run(config: RunConfig | TaskRun, workdir: str | Path) -> None:
    """Refuses processes that were started together and do not do the same.

    Args:
      config: of this process.
      workdir: likewise.

    Raises:
      ValueError: process 0 has others.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps([str(workdir), to_dict(config)], default=str).encode()
    different = [i for i, other in enumerate(bytes_of_all(text)) if other != text]
    if different:
        raise ValueError(
            f"process {jax.process_index()} has another config or workdir than {different}: start all "
            "processes with the same arguments, or each alone (--processes 1)"
        )


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


def extra_numbers(
    rate: optax.Schedule, used: Utilization, step: int, metrics: Mapping[str, float]
) -> dict[str, float]:
    """The learning rate of a step, how much of the devices is used, and the most memory taken until then.

    Args:
      rate: learning rate by steps done.
      used: counts what the steps compute.
      step: the step, counted from 1.
      metrics: of the steps since the last line.
    """
    memory = peak_memory_bytes()
    there = {} if memory is None else {"peak_memory_gib": memory / 2**30}
    return {"lr": float(np.asarray(rate(step - 1))), **used.numbers(metrics), **there}


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
    if not is_first():
        return Writers(())

    named = make_writers(config.log, workdir, to_dict(config), start)
    return Writers([ProgressWriter(config.train.steps, start), *named, *more])

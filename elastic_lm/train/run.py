"""A training run from its config: model, data, method, loop, and the finished model on disk."""

import dataclasses
import functools
import logging
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.checkpoints.native import (
    MENU_FILE,
    Checkpoints,
    check_target,
    load_menu,
    local_folder,
    save_model,
)
from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.data import pipeline
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.depth.cached_taps import cached_batches, place_taps
from elastic_lm.depth.ee_tuning import EETuning, JointTraining
from elastic_lm.depth.self_supervised import CachedExits, SelfSupervisedExits
from elastic_lm.depth.sorted_finetuning import SortedFineTuning, extract
from elastic_lm.models.decoder import Params, init_params, stack_layers, unstack_layers
from elastic_lm.models.exits import attach_exits
from elastic_lm.models.sharding import make_mesh, param_shardings, stacked_shardings
from elastic_lm.report.writers import JsonlWriter, ProgressWriter, TensorBoardWriter, Writer, Writers
from elastic_lm.train import loop
from elastic_lm.train.config import WITHOUT_EXITS, RunConfig
from elastic_lm.train.identity import check_identity, save_identity
from elastic_lm.train.losses import Method
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.pretraining import Pretraining
from elastic_lm.train.state import TrainState, create_state, state_shardings
from elastic_lm.train.step import make_eval_step, make_train_step, place_batch
from elastic_lm.width.elastic_training import TEACHER, ElasticEvaluation, ElasticTraining
from elastic_lm.width.ranking import rank_state
from elastic_lm.width.router_training import (
    ROUTERS,
    SURROGATE,
    RouterEvaluation,
    RouterTraining,
    check_held_out,
    finished_routers,
    router_training,
)

MODEL_FOLDER = "model"
ELASTIC_GROUPS = 16  # of a model that becomes elastic; devices of a tensor axis divide them


def fit(config: RunConfig, workdir: str | Path) -> tuple[ModelConfig, Params, dict[str, float]]:
    """Trains what `config` describes; run again after a stop, it continues where it was.

    Args:
      config: the whole run.
      workdir: folder for the tokenizer, checkpoints, metrics.jsonl and the finished model/.

    Returns:
      (model config, canonical parameters, metrics of the last held-out evaluation).

    Raises:
      FileNotFoundError: data, tokenizer or initial checkpoint do not exist.
      FloatingPointError: training diverged; names the step.
      ValueError: a file or field is unusable, or `workdir` is remote or holds another run; names it.
    """
    workdir, train = local_folder(workdir), config.train
    check_identity(config, workdir)
    check_target(workdir / MODEL_FOLDER, overwrite=True)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _check_rows(config, mesh)
    tokenizer = prepare_tokenizer(config, workdir)
    model, job, state, frozen = prepare(config, mesh, tokenizer)
    save_identity(config, workdir)
    pipeline.check_learnable(config.data, tokenizer)
    batches: Any = iter(pipeline.train_batches(config.data, tokenizer))
    method = make_method(config, model)
    if train.cached_batches and isinstance(method, SelfSupervisedExits):
        batches = cached_batches(method, frozen, batches, train.cached_batches, mesh, config.data.seed)
    with closing(Checkpoints(workdir / "checkpoints", train.keep)) as checkpoints:
        start, state = loop.resume(checkpoints, state, batches)
        if not start and job.begin:
            print(f"ranking neurons and heads on {train.rank_batches} batches", flush=True)
            state = job.begin(state)
        with closing(make_writer(workdir, train.steps, start)) as writer:
            state, metrics = loop.run(job, start, state, frozen, batches, checkpoints, writer)
    trained = {**frozen, **state.params}
    beside = (TEACHER, ROUTERS, SURROGATE)
    params = unstack_layers({name: tree for name, tree in trained.items() if name not in beside})
    routers = None
    if isinstance(method, RouterTraining):
        routers = finished_routers(method, trained, held_out(config, tokenizer), mesh)
    save_model(
        workdir / MODEL_FOLDER,
        model,
        params,
        tokenizer,
        menu=menu_of(config, method),
        beside=None if routers is None else routers.save,
        overwrite=True,
    )
    return model, params, metrics


def prepare(
    config: RunConfig, mesh: Mesh, tokenizer: Tokenizer
) -> tuple[ModelConfig, loop.Job, TrainState, Params]:
    """Everything a loop needs, at step 0.

    Args:
      config: the whole run.
      mesh: from `sharding.make_mesh`.
      tokenizer: of the model.

    Returns:
      (model config, compiled steps, what trains, what does not), parameters stacked and on the mesh. With
      flextron the config has `elastic_groups`; a pretrained model without any is sorted by `job.begin`, and
      its frozen teacher stays in the order it had.

    Raises:
      FileNotFoundError: see `prepare_model`.
      ValueError: see `prepare_model`.
    """
    model, params = prepare_model(config, tokenizer, mesh)
    unsorted = config.train.method == "flextron" and not model.elastic_groups
    if unsorted:
        model = dataclasses.replace(model, elastic_groups=config.train.elastic_groups or ELASTIC_GROUPS)
    asked, fix = config.train.elastic_groups, f"the model has {model.elastic_groups} already; set 0 to keep"
    require(asked in (0, model.elastic_groups), "train.elastic_groups", asked, fix)
    ranking = functools.partial(rank_state, config, model, tokenizer, mesh)
    method, optimizer = make_method(config, model), make_optimizer(config.train)
    shardings = stacked_shardings(param_shardings(model, mesh))
    trainable, frozen = method.split(jax.device_put(stack_layers(params), shardings))
    places = state_shardings(optimizer, trainable)
    stepped = method
    if config.train.cached_batches and isinstance(method, SelfSupervisedExits):
        stepped = CachedExits(method)
    measured = make_method(for_evaluation(config), model)
    if isinstance(measured, ElasticTraining):
        measured = ElasticEvaluation(measured)
    if isinstance(measured, RouterTraining):
        check_held_out(measured, held_out(config, tokenizer))
        measured = RouterEvaluation(measured)
    job = loop.Job(
        config=config.train,
        mesh=mesh,
        train_step=make_train_step(stepped, optimizer, places, config.train.accumulate),
        eval_step=make_eval_step(measured),
        held_out=functools.partial(held_out, config, tokenizer),
        per_step=config.data.batch_size * config.data.seq_len,
        place=place_taps if isinstance(stepped, CachedExits) else place_batch,
        begin=ranking if unsorted and config.train.init_from else None,
    )
    return model, job, create_state(optimizer, trainable), frozen


def prepare_tokenizer(config: RunConfig, workdir: Path) -> Tokenizer:
    """The configured tokenizer, that of the initial checkpoint, or a BPE learned from the training text.

    A learned one is kept in `workdir`, so a resumed run reads the same ids.

    Args:
      config: the whole run.
      workdir: a learned tokenizer.json is written here, or read where it lies there already.

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: the configured tokenizer, or the text to learn one from, does not exist.
    """
    source = config.data.tokenizer or config.train.init_from
    if source:
        return Tokenizer.load(source)
    if not (workdir / "tokenizer.json").is_file():
        assert config.model is not None
        train_bpe(pipeline.file_texts(config.data), config.model.vocab_size).save(workdir)
    return Tokenizer.load(workdir)


def prepare_model(config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> tuple[ModelConfig, Params]:
    """Random or loaded parameters, with the configured exits attached.

    Args:
      config: the whole run.
      tokenizer: its special tokens go into a new model; its ids must fit the vocabulary.
      mesh: where loaded parameters go.

    Returns:
      (model config, canonical parameters).

    Raises:
      FileNotFoundError: the initial checkpoint does not exist.
      ValueError: vocabulary, rows, layers or exits do not fit the model or the method; names the field.
    """
    key = jax.random.key(config.train.seed)
    if config.train.init_from:
        decoder, params = load_decoder(
            config.train.init_from, dtype=config.train.param_dtype or None, mesh=mesh
        )
        model = decoder.config
        if config.train.init_layers:
            model, params = extract(model, params, config.train.init_layers)
        if model.exits and config.train.method in WITHOUT_EXITS:
            raise ValueError(
                f"train.method={config.train.method!r}: {config.train.init_from} has exits, which it does "
                "not train; choose joint or ee_tuning, or export the model without exits"
            )
    else:
        assert config.model is not None
        model = dataclasses.replace(config.model, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids)
        params = init_params(model, key)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids; raise it"
        )
    if config.data.seq_len > model.max_len:
        raise ValueError(
            f"data.seq_len={config.data.seq_len}: above model.max_len={model.max_len}; shorten it"
        )
    if config.train.dtype:
        model = dataclasses.replace(model, dtype=config.train.dtype)
    if config.exits:
        model, params = attach_exits(model, params, config.exits, jax.random.fold_in(key, 1))
    return model, params


def make_method(config: RunConfig, model: ModelConfig) -> Method:
    """The training method that `config.train.method` names.

    Args:
      config: the whole run.
      model: the model with its exits; static.

    Returns:
      The method.

    Raises:
      ValueError: its options do not fit the model, like weights of exits that it lacks.
    """
    train = config.train
    if train.method == "pretraining":
        return Pretraining(model, train.remat, train.loss_chunk)
    if train.method == "sorted_finetuning":
        return SortedFineTuning.of(model, train)
    if train.method == "flextron":
        return ElasticTraining.of(model, train)
    if train.method == "routers":
        return router_training(train, model)
    if train.method == "self_supervised_exits":
        return SelfSupervisedExits(
            model, train.objective, train.top_k, train.imitation, train.balance_gates, train.loss_chunk
        )
    tuning = EETuning if train.method == "ee_tuning" else JointTraining
    return tuning(
        model,
        weights=train.exit_weights,
        warmup_steps=train.exit_warmup,
        dynamic_token_weights=train.confidence_weighted,
        chunk=train.loss_chunk,
        remat=train.remat,
    )


def menu_of(config: RunConfig, method: Method) -> Menu | None:
    """The choices that a model is elastic for once a method has trained it.

    Args:
      config: the whole run.
      method: of the run.

    Returns:
      The method's menu, or that of the initial checkpoint where its layers are all kept; None = neither.
    """
    if isinstance(method, RouterTraining):
        return method.shape.menu
    if isinstance(method, ElasticTraining):
        return method.menu
    kept = (Path(config.train.init_from) / MENU_FILE).is_file() and not config.train.init_layers
    return load_menu(config.train.init_from) if config.train.init_from and kept else None


def for_evaluation(config: RunConfig) -> RunConfig:
    """The same run with every sub-model in the loss and nothing dropped."""
    whole = dataclasses.replace(
        config.train, curriculum="all", curriculum_period=0, layer_dropout=0.0, dropout_ramp=0
    )
    return dataclasses.replace(config, train=whole)


def held_out(config: RunConfig, tokenizer: Tokenizer) -> Iterable[dict]:
    """One pass over the held-out split.

    Args:
      config: the whole run; `data` is read.
      tokenizer: of the model.

    Returns:
      Dicts with the fields of `Batch`, [batch_size, seq_len] NumPy arrays; none where no held-out text is
      named.
    """
    if config.data.source != "stdlib" and not config.data.eval_paths:
        return ()
    return pipeline.eval_batches(config.data, tokenizer)


def _check_rows(config: RunConfig, mesh: Mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulate
    if config.data.batch_size % parts:
        raise ValueError(
            f"data.batch_size={config.data.batch_size}: must be a multiple of {parts}, the devices that hold "
            "different rows times train.accumulate"
        )


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

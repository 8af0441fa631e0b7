"""A training run without arrays: the shapes, dtypes and places of all that its step reads, from its config.

The method, the parameters, the optimizer's state and their shardings come from the functions that a run
calls, under `jax.eval_shape`, so that a model of any size is described without memory and its step can be
compiled for devices that are not there (`cost.compiled`).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Params, stack_layers
from elastic_lm.models.exits import attach_exits, extract
from elastic_lm.models.registry import Config, abstract_params
from elastic_lm.models.sharding import (
    batch_sharding,
    check_columns,
    check_rows,
    column_sharding,
    param_shardings,
    replicated,
    stacked_shardings,
)
from elastic_lm.nn.kernels import choose
from elastic_lm.train.config import RunConfig, TaskRun, with_seeds
from elastic_lm.train.method import TEACHER, Method
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.registry import method_class
from elastic_lm.train.state import TrainState, cast_params, state_shardings
from elastic_lm.train.step import TrainStep, make_train_step
from elastic_lm.train.tasks.models import prepare_encoder, prepare_encoder_head
from elastic_lm.train.tasks.seq2seq import PairBatch
from elastic_lm.train.tasks.tuning import TaskBatch

TWO_CLASSES = ("0", "1")  # of a task that names none: how many there are changes little


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A run at step 0, of which nothing exists.

    Attributes:
      method: trains the model; its `config` is the model's.
      state: shapes, dtypes and shardings of the state.
      frozen: likewise, of the frozen parameters.
      batch: likewise, of a batch.
      step: the function that a run compiles.
      mesh: where all of it would lie.
    """

    method: Method[Any]
    state: TrainState
    frozen: Params
    batch: Any
    step: TrainStep
    mesh: Mesh


def abstract_run(given: RunConfig | TaskRun, mesh: Mesh, model: Config | None = None) -> AbstractRun:
    """Describes a run from its config.

    Args:
      given: the whole run; its data is not read.
      mesh: from `sharding.make_mesh`, or one of devices that are only described.
      model: of `train.init_from`, with the dtypes that it would be loaded in; None = a new model's config.

    Returns:
      The run; `step` with `state`, `frozen` and `batch` is what `train.fit` compiles.

    Raises:
      ValueError: something does not fit; names field, value and fix.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.models.sharding import make_mesh
      from elastic_lm.train.abstract import abstract_run

      run = el.RunConfig(model=el.testing.tiny_config(), data=el.DataConfig(seq_len=32, batch_size=2))
      found = abstract_run(run, make_mesh(data=1, fsdp=1, tensor=1))
      assert found.batch.tokens.shape == (2, 32)
      ```
    """
    config = with_seeds(given)
    model = _base_model(config, model)
    if config.train.param_dtype:
        model = dataclasses.replace(
            model, dtype=config.train.param_dtype, param_dtype=config.train.param_dtype
        )
    if isinstance(config, TaskRun):
        check_rows("task.batch_size", config.task.batch_size, mesh, config.train.accumulate)
    else:
        check_rows("data.batch_size", config.data.batch_size, mesh, config.train.accumulate)
        check_columns("data.seq_len", config.data.seq_len, mesh)

    held: dict[str, Any] = {}

    def build(params: Params) -> tuple[Params, Params]:
        """`train.text.prepare_text` or `train.tasks.run.prepare_task`, where they make parameters."""
        prepare = _task_model if isinstance(config, TaskRun) else _text_model
        held["model"], params = prepare(config, model, params)  # pyright: ignore[reportArgumentType]
        cls = method_class(config.method.name)
        held["method"], params = cls.create(config.method, held["model"], params, config.train, mesh)
        return held["method"].split(params)

    trainable, frozen = jax.eval_shape(build, nn.unbox(abstract_params(model)))
    method: Method[Any] = held["method"]
    shardings = param_shardings(held["model"], mesh)
    if isinstance(config, RunConfig):
        shardings = stacked_shardings(shardings)
    trainable, frozen = (_on_mesh(tree, shardings, mesh) for tree in (trainable, frozen))

    optimizer = make_optimizer(config.train, method.parameter_groups())
    places = state_shardings(optimizer, trainable)
    state = _abstract_state(optimizer, trainable, config.train.param_dtype or "float32", places)
    kernel = choose(config.train.attention, mesh) if isinstance(mesh, Mesh) else None
    step = make_train_step(method, optimizer, places, config.train.accumulate, kernel)
    return AbstractRun(method, state, frozen, _abstract_batch(config, method, frozen, mesh), step, mesh)


def _base_model(config: RunConfig | TaskRun, model: Config | None) -> Config:
    """The model that the run starts from."""
    if config.train.init_from:
        require(model is not None, "train.init_from", config.train.init_from, "describe its model")
    elif isinstance(config, RunConfig):
        model = model or config.model
    else:
        model = model or config.encoder or config.encoder_decoder
    assert model is not None
    teacher = getattr(config.method, "teacher_from", "")
    require(
        not teacher,
        "method.teacher_from",
        teacher,
        "a teacher is not described without its weights; leave it and method.distil out, and add its "
        "parameters to what each device holds",
    )
    return model


def _text_model(config: RunConfig, model: Config, params: Params) -> tuple[ModelConfig, Params]:
    """The decoder that trains, its layers stacked."""
    if not isinstance(model, ModelConfig):
        raise ValueError(f"train.init_from={config.train.init_from!r}: holds no decoder, which text trains")
    train, key = config.train, jax.random.key(config.train.seed or 0)
    if train.init_layers:
        model, params = extract(model, params, train.init_layers)
    fix = f"above model.max_len={model.max_len}; shorten it"
    require(config.data.seq_len <= model.max_len, "data.seq_len", config.data.seq_len, fix)
    if train.dtype:
        model = dataclasses.replace(model, dtype=train.dtype)
    if config.exits:
        model, params = attach_exits(model, params, config.exits, jax.random.fold_in(key, 1))
    return model, stack_layers(params)


def _task_model(run: TaskRun, model: Config, params: Params) -> tuple[Config, Params]:
    """The encoder or encoder-decoder that trains, with its head."""
    labels = run.task.labels or (TWO_CLASSES if run.task.problem == "classification" else ())
    if run.task.problem != "text_to_text":
        if isinstance(model, EncoderConfig):
            model, params = prepare_encoder(run, model, params, labels)
        else:
            assert isinstance(model, EncoderDecoderConfig)
            model, params = prepare_encoder_head(run, model, params, labels)
    return dataclasses.replace(model, dtype=run.train.dtype or model.dtype), params


def _on_mesh(tree: Params, shardings: Params, mesh: Mesh) -> Params:
    """Gives every parameter its place; those that a method adds lie whole on every device."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(shardings))
    everywhere = replicated(mesh)

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = path[1:] if path[0].key == TEACHER else path
        sharding: NamedSharding = by_path.get(own, everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, tree)


def _abstract_state(
    optimizer: optax.GradientTransformation, params: Params, dtype: str, places: TrainState
) -> TrainState:
    """`train.state.create_state`, without arrays."""

    def create(params: Params) -> TrainState:
        params = cast_params(params, dtype)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.tree.map(_placed, jax.eval_shape(create, params), places)


def _abstract_batch(config: RunConfig | TaskRun, method: Method[Any], frozen: Params, mesh: Mesh) -> Any:
    """A batch of the widest rows, as the steps read it."""
    rows, columns = batch_sharding(mesh), column_sharding(mesh)
    if isinstance(config, RunConfig):
        shape = config.data.batch_size, config.data.seq_len
        ids, weights = _array(shape, jnp.int32, columns), _array(shape, jnp.float32, columns)
        batch = Batch(ids, ids, weights, ids, ids)
        if not getattr(method, "cached_batches", 0):
            return batch
        # What the frozen layers gave for a batch takes its place.
        taps = jax.eval_shape(getattr(method, "taps"), frozen, batch)  # noqa: B009
        return jax.tree.map(lambda leaf: _placed(leaf, columns if leaf.ndim > 1 else rows), taps)

    task = config.task
    shape = task.batch_size, task.max_len
    ids, mask = _array(shape, jnp.int32, rows), _array(shape, jnp.bool_, rows)
    if method.batch is PairBatch:
        shape = task.batch_size, task.max_target
        written, weights = _array(shape, jnp.int32, rows), _array(shape, jnp.float32, rows)
        return PairBatch(ids, mask, written, written, weights)

    kind = jnp.int32 if task.problem == "classification" else jnp.float32
    targets, weights = (_array(shape[:1], dtype, rows) for dtype in (kind, jnp.float32))
    return TaskBatch(ids, mask, ids, targets, weights)


def _array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    """What stands for an array that does not exist."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

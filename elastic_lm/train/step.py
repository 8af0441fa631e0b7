"""One optimizer step and one evaluation step, compiled once, for any method and its batches."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Params
from elastic_lm.models.sharding import batch_sharding, column_sharding
from elastic_lm.nn.kernels import Kernel, attention_by
from elastic_lm.nn.placement import traced_on
from elastic_lm.nn.sequence import over_sequence
from elastic_lm.processes import whole_batch
from elastic_lm.train.losses import Metrics
from elastic_lm.train.method import Method
from elastic_lm.train.state import TrainState

TrainStep = Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, Params, Any], tuple[Metrics, jax.Array]]


def make_train_step(
    method: Method[Any],
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    accumulate: int = 1,
    attention: Kernel | None = None,
) -> TrainStep:
    """Compiles (state, frozen, batch) -> (state, metrics); the state's memory is reused.

    Args:
      method: loss and trainable parameters; static.
      optimizer: updates the trainable parameters.
      shardings: of the state, from `state_shardings`.
      accumulate: parts the batch is computed in, weighted by their counted tokens, so the update is
        that of the whole batch; static.
      attention: kernel that computes attention, from `kernels.choose`; None = XLA. Static.

    Returns:
      The compiled step. Metrics are those of the method plus `grad_norm` before clipping.
    """

    mesh = jax.tree.leaves(shardings)[0].mesh

    def train_step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        with over_sequence(mesh), attention_by(attention):
            gradients, metrics = _gradients(method, state, frozen, batch, accumulate)

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        metrics = {**metrics, "grad_norm": optax.tree.norm(gradients)}
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    # Static: method, optimizer, parts. Traced: state, frozen parameters and batch. The state is donated.
    return jax.jit(traced_on(train_step, mesh), donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(
    method: Method[Any], mesh: Mesh | None = None, attention: Kernel | None = None
) -> EvalStep:
    """Compiles (trainable, frozen, batch) -> (metrics, counted tokens).

    Args:
      method: the loss; static.
      mesh: of the parameters and batches; None = one device.
      attention: as in `make_train_step`.
    """

    def eval_step(trainable: Params, frozen: Params, batch: Any) -> tuple[Metrics, jax.Array]:
        # At the largest step number, schedules (such as that of the exits' weights) have their last value.
        with over_sequence(mesh), attention_by(attention):
            _, metrics = method.loss(trainable, frozen, batch, jnp.asarray(jnp.iinfo(jnp.int32).max))
        return metrics, jnp.sum(batch.weights)

    return jax.jit(traced_on(eval_step, mesh))


def place_batch(arrays: Any, mesh: Mesh, batch: type = Batch) -> Any:
    """Puts a host batch on the mesh, rows over data and fsdp, and columns over sequence.

    Args:
      arrays: this process's rows, whole: the fields of `batch` by name, or a tree of arrays that is a batch
        already.
      mesh: from `sharding.make_mesh`.
      batch: class of the batch that the fields make.

    Returns:
      The batch, of global arrays: the rows of all processes, with as many columns as `arrays` have.
    """
    rows, columns = batch_sharding(mesh), column_sharding(mesh)

    def put(leaf: Any) -> jax.Array:
        # Told, and not found out: a process has some rows, and always all of their columns.
        shape = (whole_batch(rows, len(leaf)), *leaf.shape[1:])
        return jax.make_array_from_process_local_data(columns if leaf.ndim > 1 else rows, leaf, shape)

    placed = jax.tree.map(put, arrays)
    return batch(**placed) if isinstance(placed, Mapping) else placed


def _gradients(
    method: Method[Any], state: TrainState, frozen: Params, batch: Any, accumulate: int
) -> tuple[Params, Metrics]:
    grad = jax.value_and_grad(method.loss, has_aux=True)
    if accumulate == 1:
        (_, metrics), gradients = grad(state.params, frozen, batch, state.step)
        return gradients, metrics

    parts = jax.tree.map(lambda x: _split_rows(x, accumulate), batch)
    total = jnp.maximum(jnp.sum(batch.weights), 1.0)

    # A part counts by its tokens, so that the update is that of the whole batch.
    def one(part: Any) -> Any:
        (_, metrics), gradients = grad(state.params, frozen, part, state.step)
        share = jnp.sum(part.weights) / total
        return jax.tree.map(lambda x: share.astype(x.dtype) * x, (gradients, metrics))

    # Sums start as zeros of the shapes that a part gives, so that the scan compiles one part.
    first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    sums, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, one(part)), None), zero, parts)
    return sums


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...], each part taking rows from every device."""
    return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

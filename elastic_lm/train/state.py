"""What changes from step to step, and where it lives."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from elastic_lm.models.decoder import Params
from elastic_lm.sharding import replicated


@flax.struct.dataclass
class TrainState:
    """The part of a run that a step rewrites and a checkpoint holds.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: trainable parameters (layers stacked).
      opt_state: optimizer state of these parameters.
    """

    step: jax.Array
    params: Params
    opt_state: Any


def create_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """A state at step 0; optimizer moments are sharded like the parameters they belong to."""
    shardings = state_shardings(optimizer, params)
    init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step, params, init(params))


def state_shardings(optimizer: optax.GradientTransformation, params: Params) -> Any:
    """A `TrainState` of shardings for parameters that are already placed."""
    placed = jax.tree.map(lambda p: p.sharding, params)
    everywhere = replicated(jax.tree.leaves(placed)[0].mesh)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        placed,
        transform_non_params=lambda _: everywhere,
    )
    shardings: dict[str, Any] = {"step": everywhere, "params": placed, "opt_state": moments}
    return TrainState(**shardings)


def abstract_state(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, what a checkpoint is restored into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

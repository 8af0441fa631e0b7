"""What changes from step to step, and where it lives."""

import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from elastic_lm.models.decoder import Params
from elastic_lm.models.sharding import replicated


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
    """A state at step 0; optimizer moments are sharded like the parameters they belong to.

    Args:
      optimizer: updates the trainable parameters.
      params: trainable parameters, stacked and on the mesh; not copied.

    Returns:
      The state, on the mesh of `params`.
    """
    shardings = state_shardings(optimizer, params)
    init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step, params, init(params))


def state_shardings(optimizer: optax.GradientTransformation, params: Params) -> Any:
    """Where every part of a state lives.

    Args:
      optimizer: updates the trainable parameters.
      params: trainable parameters, already on the mesh.

    Returns:
      A `TrainState` of `NamedSharding`: a leaf of the optimizer's state with name and shape of a parameter
      has its sharding, every other one and the step are on all devices.
    """
    placed = jax.tree.map(lambda p: p.sharding, params)
    everywhere = replicated(jax.tree.leaves(placed)[0].mesh)
    by_name = {_names(path): (p.shape, p.sharding) for path, p in jax.tree_util.tree_leaves_with_path(params)}

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        shape, sharding = by_name.get(_names(path), (None, everywhere))
        return sharding if shape == leaf.shape else everywhere

    moments = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
    shardings: dict[str, Any] = {"step": everywhere, "params": placed, "opt_state": moments}
    return TrainState(**shardings)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The parameter that a leaf of an optimizer's state belongs to: the dictionary keys its path ends in."""
    keys = itertools.takewhile(lambda entry: isinstance(entry, jax.tree_util.DictKey), reversed(path))
    return tuple(entry.key for entry in keys)


def abstract_state(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, what a checkpoint is restored into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

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
      params: trainable parameters (layers stacked), in float32 whatever the model's file holds, unless
        `train.param_dtype` names another dtype.
      opt_state: optimizer state of these parameters.
    """

    step: jax.Array
    params: Params
    opt_state: Any


def create_state(
    optimizer: optax.GradientTransformation, params: Params, dtype: str = "float32"
) -> TrainState:
    """A state at step 0; optimizer moments are sharded like the parameters they belong to.

    Args:
      optimizer: updates the trainable parameters.
      params: trainable parameters, stacked and on the mesh; not copied where they have the dtype.
      dtype: in which they train. A step changes a weight by less than half precision can tell apart, so that
        in bfloat16 most of them would not move at all.

    Returns:
      The state, on the mesh of `params`.
    """
    params = cast_params(params, dtype)
    shardings = state_shardings(optimizer, params)
    init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step, params, init(params))


def cast_params(params: Params, dtype: str) -> Params:
    """The parameters in a dtype; those that have it, and integers, are the same arrays."""

    def one(leaf: jax.Array) -> jax.Array:
        same = leaf.dtype == dtype or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if same else leaf.astype(dtype)

    return jax.tree.map(one, params)


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


def abstract_state(state: Any) -> Any:
    """Shapes, dtypes and shardings of a state or of a part of it, what a checkpoint is restored into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

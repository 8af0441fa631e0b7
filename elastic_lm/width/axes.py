"""Widths of a layer in its parameters: which dimension of which tensor holds neurons, heads or channels.

Permuting, slicing and masking a model all change the same dimensions of the same tensors:

    channels   [D]            inputs of `qkv`, `up` and gates, outputs of `out` and `down`, norms, vocabulary
    neurons    [F]            outputs of `up`, inputs of `down`
    queries    [K, G + 2]     outputs of `qkv`: for every key/value group its query heads, its key, its value
    heads      [K * G * H]    inputs of `out`

An `Edit` holds one function for each; `edit_params` applies it wherever the dimension occurs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig

Params = dict[str, Any]


def unchanged(leaf: jax.Array, axis: int) -> jax.Array:
    """The edit that changes nothing."""
    return leaf


@dataclasses.dataclass(frozen=True)
class Edit:
    """What happens to each kind of dimension: functions of (array, axis).

    Attributes:
      neurons: axis has the F neurons of an MLP.
      queries: axis and axis + 1 have K key/value groups and G + 2 slots.
      heads: axis has the K * G * H outputs of all query heads.
      channels: axis has the D channels of the model.
    """

    neurons: Callable[[jax.Array, int], jax.Array] = unchanged
    queries: Callable[[jax.Array, int], jax.Array] = unchanged
    heads: Callable[[jax.Array, int], jax.Array] = unchanged
    channels: Callable[[jax.Array, int], jax.Array] = unchanged


# Kinds of the dimensions of a parameter by the end of its path, the last dimension last.
NAMES: dict[str, tuple[str | None, ...]] = {
    "embed/table": (None, "channels"),
    "positions/table": (None, "channels"),
    "head/kernel": (None, "channels"),
    "qkv/kernel": ("queries", None, None, "channels"),
    "qkv/bias": ("queries", None, None),
    "out/kernel": ("channels", "heads"),
    "out/bias": ("channels",),
    "up/kernel": ("neurons", "channels"),
    "up/bias": ("neurons",),
    "down/kernel": ("channels", "neurons"),
    "down/bias": ("channels",),
}
GATE: dict[str, tuple[str | None, ...]] = {"up/kernel": (None, "channels")}


def dimensions(path: tuple[str, ...]) -> tuple[str | None, ...]:
    """Kinds of the trailing dimensions of the parameter at `path`: fields of `Edit`, or None.

    Raises:
      ValueError: no such parameter is known.
    """
    name = "/".join(path[-2:])
    if "gate" in path:
        return GATE.get(name, ())
    if path[-1] in ("scale", "bias") and path[-2].endswith("norm"):
        return () if path[-2] in ("q_norm", "k_norm") else ("channels",)
    fix = "its widths are not known; add it to nn.widths.NAMES"
    require(name in NAMES, "parameter", "/".join(path), fix)
    return NAMES[name]


def edit_params(params: Params, edit: Edit, path: tuple[str, ...] = ()) -> Params:
    """Applies an edit to all parameters of a tree.

    Args:
      params: a model, a layer, an attention or an MLP.
      edit: what changes.
      path: where the tree lies in the model.

    Returns:
      A tree of the same structure.
    """

    def one(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        kinds = dimensions((*path, *(key.key for key in key_path)))
        for i, kind in enumerate(kinds):
            if kind is not None:
                leaf = getattr(edit, kind)(leaf, leaf.ndim - len(kinds) + i)
        return leaf

    return jax.tree_util.tree_map_with_path(one, params)


def slice_edit(config: ModelConfig, mlp: int, heads: int, groups: int, d_model: int) -> Edit:
    """Keeps the leading neurons of every storage group, heads of every group, groups and channels.

    All slices are static and lie inside what tensor parallelism leaves on a device, as long as it splits
    no storage group: they move no data between devices.

    Args:
      config: homogeneous config of the layer (`ModelConfig.layer`); static.
      mlp: neurons that stay.
      heads: query heads that stay in every key/value group.
      groups: key/value groups that stay.
      d_model: channels that stay.
    """
    c = config

    def queries(leaf: jax.Array, axis: int) -> jax.Array:
        leaf = prefix(leaf, axis, groups)
        if heads == c.group_size:
            return leaf
        key_value = jax.lax.slice_in_dim(leaf, c.group_size, None, axis=axis + 1)
        return jnp.concatenate([prefix(leaf, axis + 1, heads), key_value], axis + 1)

    def outputs(leaf: jax.Array, axis: int) -> jax.Array:
        if (groups, heads) == (c.n_kv_heads, c.group_size):
            return leaf
        parts = split(leaf, axis, (c.n_kv_heads, c.group_size, c.head_dim))
        return merge(prefix(prefix(parts, axis, groups), axis + 1, heads), axis, 3)

    return Edit(
        lambda leaf, axis: grouped_prefix(leaf, axis, mlp, c.elastic_groups),
        queries,
        outputs,
        lambda leaf, axis: grouped_prefix(leaf, axis, d_model, c.elastic_groups),
    )


def mask_edit(config: ModelConfig, mlp: int, heads: int, groups: int, d_model: int) -> Edit:
    """Sets to 0 what `slice_edit` with the same arguments leaves out."""
    c = config
    lives_K, lives_G = np.arange(c.n_kv_heads) < groups, np.arange(c.group_size) < heads
    lives_KG = lives_K[:, None] & lives_G
    slots = np.concatenate([lives_KG, np.repeat(lives_K[:, None], 2, 1)], axis=1)
    return Edit(
        lambda leaf, axis: masked(leaf, axis, grouped_lives(c.d_mlp, mlp, c.elastic_groups)),
        lambda leaf, axis: masked(leaf, axis, slots),
        lambda leaf, axis: masked(leaf, axis, np.repeat(lives_KG.reshape(-1), c.head_dim)),
        lambda leaf, axis: masked(leaf, axis, grouped_lives(c.d_model, d_model, c.elastic_groups)),
    )


def prefix(leaf: jax.Array, axis: int, size: int) -> jax.Array:
    """The leading `size` entries of an axis."""
    return leaf if size == leaf.shape[axis] else jax.lax.slice_in_dim(leaf, 0, size, axis=axis)


def split(leaf: jax.Array, axis: int, sizes: tuple[int, ...]) -> jax.Array:
    """One axis as several."""
    return leaf.reshape(*leaf.shape[:axis], *sizes, *leaf.shape[axis + 1 :])


def merge(leaf: jax.Array, axis: int, count: int) -> jax.Array:
    """`count` axes as one."""
    return leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + count :])


def grouped_prefix(leaf: jax.Array, axis: int, size: int, groups: int) -> jax.Array:
    """The leading size / groups entries of each of `groups` (0 = one) equal stretches of an axis."""
    if size == leaf.shape[axis] or not groups:
        return prefix(leaf, axis, size)
    parts = split(leaf, axis, (groups, leaf.shape[axis] // groups))
    return merge(prefix(parts, axis + 1, size // groups), axis, 2)


def grouped_lives(full: int, size: int, groups: int) -> np.ndarray:
    """[full] bool: what `grouped_prefix` keeps."""
    if size == full or not groups:
        return np.arange(full) < size
    return np.arange(full) % (full // groups) < size // groups


def masked(leaf: jax.Array, axis: int, lives: np.ndarray) -> jax.Array:
    """`leaf` with 0 where `lives`, over `axis` and those that follow, is False."""
    shape = (*lives.shape, *(1,) * (leaf.ndim - axis - lives.ndim))
    return jnp.where(lives.reshape(shape), leaf, jnp.zeros((), leaf.dtype))

"""Which dimension of which parameter is a width, and how all of them are edited together.

Cutting a model, masking it and sorting it by importance change the same dimensions of the same tensors. There
are four kinds of them:

    channels       [D]           the residual stream: inputs of `qkv`, `up` and gates, outputs of `out` and
                                 `down`, norms, embeddings, vocabulary heads
    neurons        [F]           outputs of `up`, inputs of `down`
    qkv_heads      [K, G + 2]    outputs of `qkv`: the G query heads, the key and the value of K groups
    head_outputs   [K * G * H]   inputs of `out`: what the query heads give, one after the other

`WIDTHS` says where they occur, so that a new tensor is described once. An `Edit` says what happens to each
kind, and `edit_params` does it to a tree of parameters. `slice_edit` and `mask_edit` make the edits of a
sub-network, `width.importance` makes those that sort.

Neurons of a ranked model are dealt out to S storage groups (`ModelConfig.elastic_groups`): the one of rank r
to group r mod S. A narrower MLP is then a prefix of every group, which tensor parallelism over a divisor of S
slices in place, without moving data between devices. Query heads are ranked inside their key/value group,
which no device splits. Key/value groups are in plain order of rank, so that cutting whole groups may move
data.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.models.decoder import Params

# Kinds of a parameter's trailing dimensions, by the last two keys of its path; None = no width. `qkv_heads`
# stands at its first dimension, K, and the second one, G + 2, follows.
WIDTHS: dict[str, tuple[str | None, ...]] = {
    "embed/table": (None, "channels"),
    "positions/table": (None, "channels"),
    "head/kernel": (None, "channels"),
    "head/bias": (None,),
    "qkv/kernel": ("qkv_heads", None, None, "channels"),
    "qkv/bias": ("qkv_heads", None, None),
    "out/kernel": ("channels", "head_outputs"),
    "out/bias": ("channels",),
    "up/kernel": ("neurons", "channels"),  # with a gate [2, F, D]: a dimension more in front
    "up/bias": ("neurons",),
    "down/kernel": ("channels", "neurons"),
    "down/bias": ("channels",),
    "map/kernel": ("channels", "channels"),  # of an exit of kind `linear`
    "map/bias": ("channels",),
}
# An exit's gate reads channels; its own hidden width is never cut.
GATE_WIDTHS: dict[str, tuple[str | None, ...]] = {"up/kernel": (None, "channels")}


def unchanged(leaf: jax.Array, axis: int) -> jax.Array:
    """The edit that changes nothing."""
    return leaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """What happens to each kind of dimension: functions of (array, axis).

    Attributes:
      channels: axis has the D channels of the model.
      neurons: axis has the F neurons of an MLP.
      qkv_heads: axis has the K key/value groups, and axis + 1 their G + 2 heads.
      head_outputs: axis has the K * G * H outputs of all query heads.
    """

    channels: Callable[[jax.Array, int], jax.Array] = unchanged
    neurons: Callable[[jax.Array, int], jax.Array] = unchanged
    qkv_heads: Callable[[jax.Array, int], jax.Array] = unchanged
    head_outputs: Callable[[jax.Array, int], jax.Array] = unchanged


def edit_params(params: Params, edit: Edit, path: tuple[str, ...] = ()) -> Params:
    """Applies an edit to all parameters of a tree.

    Args:
      params: a model, a layer, an attention or an MLP.
      edit: what changes.
      path: where the tree lies in the model.

    Returns:
      A tree of the same structure.
    """

    def edited(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        kinds = dimensions((*path, *(key.key for key in key_path)))
        for i, kind in enumerate(kinds):
            if kind is not None:
                leaf = getattr(edit, kind)(leaf, leaf.ndim - len(kinds) + i)
        return leaf

    return jax.tree_util.tree_map_with_path(edited, params)


def dimensions(path: tuple[str, ...]) -> tuple[str | None, ...]:
    """Kinds of the trailing dimensions of the parameter at `path`: fields of `Edit`, or None.

    Raises:
      ValueError: no such parameter is known.
    """
    # A kernel in 8 bits has integers of its shape, and scales of its outputs (`nn.int8`).
    if path[-1] in ("int8", "scales"):
        kinds = dimensions(path[:-1])
        return kinds if path[-1] == "int8" else kinds[:-1]

    name = "/".join(path[-2:])
    if "gate" in path:
        return GATE_WIDTHS.get(name, ())
    if path[-1] in ("scale", "bias") and path[-2].endswith("norm"):
        # Norms of queries and keys are over the dimensions of a head, which stay, or over all heads, which
        # stay then.
        return () if path[-2] in ("q_norm", "k_norm") else ("channels",)
    require(
        name in WIDTHS,
        "parameter",
        "/".join(path),
        "its widths are not known; add it to width.axes.WIDTHS",
    )
    return WIDTHS[name]


def exit_edit(exit: ExitConfig, edit: Edit) -> Edit:
    """What happens to an exit whose layer is edited by `edit`.

    The MLP beside an affine map is as wide as the exit's config says, whatever its layer's width: all of its
    neurons stay where they are.
    """
    return dataclasses.replace(edit, neurons=unchanged) if exit.kind == "linear" else edit


def slice_edit(config: ModelConfig, *, mlp: int, heads: int, kv_groups: int, d_model: int) -> Edit:
    """Keeps the leading entries of every width, those of neurons and channels in every storage group.

    All slices are static. Except for whole key/value groups, they lie inside what tensor parallelism leaves
    on a device, as long as it splits no storage group: they move no data between devices.

    Args:
      config: homogeneous config of the layer (`ModelConfig.layer`); static.
      mlp: neurons that stay.
      heads: query heads that stay in every key/value group.
      kv_groups: key/value groups that stay.
      d_model: channels that stay.
    """
    c = config

    def channels(leaf: jax.Array, axis: int) -> jax.Array:
        return grouped_prefix(leaf, axis, d_model, c.elastic_groups)

    def neurons(leaf: jax.Array, axis: int) -> jax.Array:
        return grouped_prefix(leaf, axis, mlp, c.elastic_groups)

    def qkv_heads(leaf: jax.Array, axis: int) -> jax.Array:
        leaf = prefix(leaf, axis, kv_groups)
        if heads == c.group_size:
            return leaf
        # The key and the value of a group stand behind all its query heads, and stay.
        key_value = jax.lax.slice_in_dim(leaf, c.group_size, None, axis=axis + 1)
        return jnp.concatenate([prefix(leaf, axis + 1, heads), key_value], axis + 1)

    def head_outputs(leaf: jax.Array, axis: int) -> jax.Array:
        if (kv_groups, heads) == (c.n_kv_heads, c.group_size):
            return leaf
        parts = split(leaf, axis, (c.n_kv_heads, c.group_size, c.head_dim))
        return merge(prefix(prefix(parts, axis, kv_groups), axis + 1, heads), axis, 3)

    return Edit(channels=channels, neurons=neurons, qkv_heads=qkv_heads, head_outputs=head_outputs)


def mask_edit(config: ModelConfig, *, mlp: int, heads: int, kv_groups: int, d_model: int) -> Edit:
    """Sets to 0 what `slice_edit` with the same arguments leaves out."""
    c = config
    keeps_D = grouped_kept(c.d_model, d_model, c.elastic_groups)
    keeps_F = grouped_kept(c.d_mlp, mlp, c.elastic_groups)

    # A group that stays keeps its key and its value whatever happens to its query heads.
    keeps_K, keeps_G = np.arange(c.n_kv_heads) < kv_groups, np.arange(c.group_size) < heads
    keeps_KG = keeps_K[:, None] & keeps_G
    keeps_qkv = np.concatenate([keeps_KG, np.repeat(keeps_K[:, None], 2, 1)], axis=1)  # [K, G + 2]
    keeps_outputs = np.repeat(keeps_KG.reshape(-1), c.head_dim)  # [K * G * H]

    return Edit(
        channels=lambda leaf, axis: masked(leaf, axis, keeps_D),
        neurons=lambda leaf, axis: masked(leaf, axis, keeps_F),
        qkv_heads=lambda leaf, axis: masked(leaf, axis, keeps_qkv),
        head_outputs=lambda leaf, axis: masked(leaf, axis, keeps_outputs),
    )


def grouped_prefix(leaf: jax.Array, axis: int, size: int, storage_groups: int) -> jax.Array:
    """The leading size / S entries of each of S storage groups, equal stretches of the axis; 0 = one."""
    if size == leaf.shape[axis] or not storage_groups:
        return prefix(leaf, axis, size)
    parts = split(leaf, axis, (storage_groups, leaf.shape[axis] // storage_groups))
    return merge(prefix(parts, axis + 1, size // storage_groups), axis, 2)


def grouped_kept(full: int, size: int, storage_groups: int) -> np.ndarray:
    """[full] bool: True for what `grouped_prefix` keeps."""
    if size == full or not storage_groups:
        return np.arange(full) < size
    return np.arange(full) % (full // storage_groups) < size // storage_groups


def prefix(leaf: jax.Array, axis: int, size: int) -> jax.Array:
    """The leading `size` entries of an axis."""
    return leaf if size == leaf.shape[axis] else jax.lax.slice_in_dim(leaf, 0, size, axis=axis)


def split(leaf: jax.Array, axis: int, sizes: tuple[int, ...]) -> jax.Array:
    """One axis as several."""
    return leaf.reshape(*leaf.shape[:axis], *sizes, *leaf.shape[axis + 1 :])


def merge(leaf: jax.Array, axis: int, count: int) -> jax.Array:
    """`count` axes as one."""
    return leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + count :])


def masked(leaf: jax.Array, axis: int, keeps: np.ndarray) -> jax.Array:
    """`leaf` with 0 where `keeps`, over `axis` and the axes after it, is False."""
    shape = (*keeps.shape, *(1,) * (leaf.ndim - axis - keeps.ndim))
    return jnp.where(keeps.reshape(shape), leaf, jnp.zeros((), leaf.dtype))

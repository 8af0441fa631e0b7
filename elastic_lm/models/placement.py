"""Where the parameters of a model lie while it decodes: in which layout on a TPU, and on which mesh.

A TPU keeps arrays in tiles of 8 x 128 numbers, and by default an array lies in the order of its dimensions
that pads least: an embedding [49152, 576] lies as [576, 49152]. Its rows are looked up, for which XLA copied
all of it, at every call or even for every token. Laid out once in row order, nothing is copied. The matrix
unit takes kernels in the default order; the vector unit, which multiplies in float32, wants row order
(`nn.linear`). Where the last dimension is a multiple of 128, row order is the default.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastic_lm.models.decoder import Params
from elastic_lm.nn.placement import ROWS

HEAD_AXIS = "tensor"  # of a mesh: its devices hold different heads


def placed_for_decoding(params: Params, dtype: str) -> Params:
    """The parameters where and as decoding reads them without a copy.

    Args:
      params: canonical; on devices of any kind, on one or on a mesh.
      dtype: of activations, which kernels and tables are rounded to when they are read.

    Returns:
      On TPUs, the same parameters, those that are looked up and those in float32 in row order, and float32
      kernels and tables in `dtype`; what was so already is the same array. Elsewhere, the same tree.
    """
    if not any(_platform(leaf) == "tpu" for leaf in jax.tree.leaves(params)):
        return params

    def placed(path: Any, x: jax.Array) -> jax.Array:
        x = x.astype(_read_in(path, x, dtype))
        return in_row_order(x) if _wants_row_order(path, x.dtype) else x

    return jax.tree_util.tree_map_with_path(placed, params)


def described_for_decoding(params: Params, dtype: str) -> Params:
    """Descriptions of parameters on TPUs, `jax.ShapeDtypeStruct`, as `placed_for_decoding` lays them out."""

    def described(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        read_in = _read_in(path, x, dtype)
        place = row_order(x) if _wants_row_order(path, read_in) else x.sharding
        return jax.ShapeDtypeStruct(x.shape, read_in, sharding=place)

    return jax.tree_util.tree_map_with_path(described, params)


def _wants_row_order(path: Any, dtype: Any) -> bool:
    """Whether its rows are looked up, as of tables and previewed heads, or the vector unit reads it."""
    return dtype == jnp.float32 or bool({"table", "head"} & {getattr(key, "key", "") for key in path})


def _read_in(path: Any, x: Any, dtype: str) -> Any:
    """The dtype in which a parameter is read.

    XLA would move the rounding of a kernel out of the loop: a copy of it, at every call.
    """
    rounded = getattr(path[-1], "key", "") in ("kernel", "table") and x.dtype == jnp.float32
    return jnp.dtype(dtype) if rounded else x.dtype


def in_row_order(x: jax.Array) -> jax.Array:
    """The array itself if its last dimension is contiguous, then the one before, and so on; or a copy."""
    wanted = tuple(range(x.ndim))
    layout = getattr(getattr(x, "format", None), "layout", None)
    if layout is None or layout.major_to_minor == wanted:
        return x
    return jax.device_put(x, row_order(x))


def row_order(x: Any) -> Format:
    """Row order, where an array, or the description of one with a sharding, lies."""
    return Format(Layout(tuple(range(x.ndim))), x.sharding)


def _platform(leaf: Any) -> str:
    return next(iter(leaf.devices())).platform if isinstance(leaf, jax.Array) else ""


def mesh_of(params: Params) -> Mesh | None:
    """The mesh of several devices that parameters lie on, with the axes of `sharding.make_mesh`.

    Args:
      params: canonical.

    Returns:
      The mesh; None where they lie on one device, or on a mesh whose axes mean something else.
    """
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            mesh = sharding.mesh
            known = {*ROWS, HEAD_AXIS} <= set(mesh.axis_names)
            return mesh if isinstance(mesh, Mesh) and known else None
    return None


def rows_over(mesh: Mesh, rows: int) -> tuple[str, ...]:
    """The axes of a mesh that rows are divided over: those that hold different rows, as far as they divide.

    Args:
      mesh: from `sharding.make_mesh`.
      rows: of a batch.
    """
    for axes in (ROWS, ROWS[:1], ROWS[1:]):
        devices = 1
        for axis in axes:
            devices *= mesh.shape[axis]
        if devices > 1 and rows % devices == 0:
            return tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return ()


def heads_over(mesh: Mesh, heads: int) -> str | None:
    """The axis that key/value heads are divided over; None = every device holds all of them."""
    devices = mesh.shape[HEAD_AXIS]
    return HEAD_AXIS if devices > 1 and heads % devices == 0 else None


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Sharding of [B, ...] arrays of B = `rows`."""
    return NamedSharding(mesh, PartitionSpec(rows_over(mesh, rows) or None))


def rows_beside(params: Params, batch: Any) -> Any:
    """A tree of [B, ...] arrays, divided over the mesh that parameters lie on; the same tree without a mesh.

    Args:
      params: of the model that reads the batch.
      batch: arrays of one number of rows.
    """
    mesh = mesh_of(params)
    if mesh is None:
        return batch
    return jax.device_put(batch, rows_sharding(mesh, jax.tree.leaves(batch)[0].shape[0]))

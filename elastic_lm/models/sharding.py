"""Where arrays live: one mesh with three or four axes, and rules from logical names to mesh axes.

Modules name the dimensions of their parameters (`nn.partition`), `Rules` maps the names to axes of the mesh,
and `jit` divides the work accordingly. One device is a mesh of one; nothing else in the package asks how
many devices there are.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elastic_lm.config.checks import require
from elastic_lm.models.decoder import LAYER, Params, alike_layers
from elastic_lm.models.registry import Config, abstract_params
from elastic_lm.nn.placement import ROWS
from elastic_lm.nn.sequence import SEQUENCE, sequence_size

AXES = ("data", "fsdp", "tensor")  # of every mesh; one with a sequence axis has it before tensor


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axis of each logical axis of a parameter; None = every device holds all of it."""

    vocab: str | None = "tensor"  # rows of the embedding and the vocabulary head
    embed: str | None = "fsdp"  # width of the residual stream
    heads: str | None = "tensor"  # concatenated heads that attention's output projection reads
    kv_heads: str | None = "tensor"  # key/value heads, each with its group of queries
    mlp: str | None = "tensor"  # hidden width of the MLP
    norm: str | None = None  # scales and biases of normalisations

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axis = getattr(self, field.name)
            if axis is not None and axis not in AXES:
                raise ValueError(f"rules.{field.name}={axis!r}: must be one of {', '.join(AXES)} or None")

    def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        """Partition of an array whose dimensions have these logical names.

        Raises:
          ValueError: a name is unknown, or two dimensions would share a mesh axis.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in names:
            if name is not None and name not in known:
                raise ValueError(f"logical axis {name!r} has no rule: known are {', '.join(known)}")
        axes = [None if name is None else getattr(self, name) for name in names]
        used = [axis for axis in axes if axis is not None]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {names} map to {tuple(axes)}: one mesh axis is used twice")
        return PartitionSpec(*axes)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    sequence: int = 1,
) -> Mesh:
    """A mesh with axes data, fsdp and tensor over all devices.

    Args:
      data: devices that hold different rows; -1, on at most one of the axes, = all that are left.
      fsdp: devices that hold different rows and different slices of the parameters.
      tensor: devices that share heads, MLP width and vocabulary.
      devices: which devices; None = all. TPUs are ordered so that neighbours on an axis, the last one above
        all, are neighbours in hardware, and slices differ in data and fsdp alone.
      sequence: devices that hold different columns of rows; 1 = the mesh has no such axis.

    Returns:
      The mesh, whose axes `jit` divides work over by itself (`AxisType.Auto`).

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or slices would share rows.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor] if sequence == 1 else [data, fsdp, sequence, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(-math.prod(sizes), 1)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        asked = f"data={data}, fsdp={fsdp}, tensor={tensor}"
        asked += "" if sequence == 1 else f", sequence={sequence}"
        raise ValueError(f"mesh {asked} does not fit {len(devices)} devices: the product must be that")
    axes = AXES if sequence == 1 else (*AXES[:-1], SEQUENCE, AXES[-1])
    return Mesh(arranged(devices, sizes), axes, axis_types=(AxisType.Auto,) * len(axes))


def arranged(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """Devices as an array of these sizes; TPUs by where they are, others in their order.

    Args:
      devices: all of one kind.
      sizes: of the axes, data and fsdp first; their product is the number of devices.

    Raises:
      ValueError: the slices that TPUs lie in cannot be divided among data and fsdp.
    """
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.asarray(devices).reshape(sizes)

    slices = len({getattr(device, "slice_index", 0) for device in devices})
    outer, left = [1] * len(sizes), slices
    for i in range(2):
        outer[i] = math.gcd(sizes[i], left)
        left //= outer[i]
    fix = f"{slices} slices are joined by a network: make data times fsdp a multiple of that"
    require(left == 1, "mesh", tuple(sizes), fix)
    inner = [size // out for size, out in zip(sizes, outer, strict=True)]

    def arrange(split: bool) -> np.ndarray:
        how: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": split}
        if slices > 1:
            return mesh_utils.create_hybrid_device_mesh(inner, outer, **how)
        return mesh_utils.create_device_mesh(inner, **how)

    try:
        return arrange(split=False)
    except NotImplementedError:  # an axis of ours is no product of axes of the hardware
        return arrange(split=True)


def param_shardings(config: Config, mesh: Mesh, rules: Rules | None = None) -> Params:
    """Sharding of every canonical parameter.

    A vocabulary that the devices cannot divide lies whole on each of them, and a warning says so.

    Args:
      config: the model; static.
      mesh: from `make_mesh`.
      rules: logical to mesh axes; None = the defaults.

    Returns:
      A tree of `NamedSharding` with the structure of the canonical parameters.

    Raises:
      ValueError: another dimension is not a multiple of the devices it is split over (names the tensor).
    """
    rules = rules or Rules()

    def one(path: tuple[Any, ...], box: Any) -> NamedSharding:
        spec, name = rules.spec(box.names), ".".join(key.key for key in path)
        for i, (size, axis) in enumerate(zip(box.value.shape, spec, strict=True)):
            if axis is not None and size % mesh.shape[axis]:
                if box.names[i] == "vocab":
                    warnings.warn(
                        f"{name} {box.value.shape}: {size} rows cannot be split over {axis}="
                        f"{mesh.shape[axis]} devices; each of them holds and computes all",
                        stacklevel=4,
                    )
                    spec = PartitionSpec(*spec[:i], None, *spec[i + 1 :])
                    continue
                raise ValueError(
                    f"{name} {box.value.shape}: {size} cannot be split over {axis}={mesh.shape[axis]} "
                    "devices; choose a divisor, or set the rule of that dimension to None"
                )
        return NamedSharding(mesh, spec)

    boxes = abstract_params(config)
    return jax.tree_util.tree_map_with_path(one, boxes, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def fitting_shardings(config: Config, mesh: Mesh, rules: Rules | None = None) -> Params:
    """`param_shardings`, with what the devices cannot divide whole on every one of them.

    Args:
      config: the model; static.
      mesh: from `make_mesh`.
      rules: logical to mesh axes; None = the defaults.
    """
    rules = rules or Rules()

    def one(box: Any) -> NamedSharding:
        axes = zip(box.value.shape, rules.spec(box.names), strict=True)
        fits = (None if axis is None or size % mesh.shape[axis] else axis for size, axis in axes)
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(one, abstract_params(config), is_leaf=lambda x: isinstance(x, nn.Partitioned))


def put_fitting(params: Params, shardings: Params) -> Params:
    """Canonical parameters in their places; integers and scales of 8 bits in that of their kernel.

    Args:
      params: arrays, or `nn.int8.Int8Kernel` in the place of some.
      shardings: from `param_shardings` or `fitting_shardings`.
    """

    def put(sharding: NamedSharding, leaf: Any) -> Any:
        def one(x: jax.Array) -> jax.Array:
            # Scales have the dimensions of the kernel's outputs, which come first.
            spec = PartitionSpec(*sharding.spec[: x.ndim])
            return jax.device_put(x, NamedSharding(sharding.mesh, spec))

        return jax.tree.map(one, leaf)

    return jax.tree.map(put, shardings, params)


def stacked_shardings(shardings: Params) -> Params:
    """Shardings of the stacked form (`decoder.stack_layers`); the layer dimension is scanned, so not split.

    Args:
      shardings: from `param_shardings`.
    """
    rest = {name: tree for name, tree in shardings.items() if not LAYER.fullmatch(name)}
    layer = jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(None, *s.spec)), shardings["layers_0"])
    return {**rest, "layers": layer}


def stack_onto(params: Params, shardings: Params) -> Params:
    """`decoder.stack_layers` onto a mesh, one parameter of all layers after the other.

    Args:
      params: canonical; the layers' arrays are deleted as soon as they are stacked, so that no device holds
        two copies of the model.
      shardings: from `stacked_shardings`.

    Returns:
      The stacked parameters, each in its place.

    Raises:
      ValueError: layers differ in size.
    """
    layers = alike_layers(params)
    rest = {name: tree for name, tree in params.items() if not LAYER.fullmatch(name)}
    placed = {name: jax.device_put(tree, shardings[name]) for name, tree in rest.items()}

    def stack(sharding: NamedSharding, *leaves: jax.Array) -> jax.Array:
        stacked = jax.jit(lambda *leaves: jnp.stack(leaves), out_shardings=sharding)(*leaves)
        for leaf in leaves:
            leaf.delete()
        return stacked

    return {**placed, "layers": jax.tree.map(stack, shardings["layers"], *layers)}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, ...] arrays: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def column_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, T, ...] arrays: rows over data and fsdp, columns over sequence, if the mesh has it."""
    if sequence_size(mesh) == 1:
        return batch_sharding(mesh)
    return NamedSharding(mesh, PartitionSpec(ROWS, SEQUENCE))


def check_columns(field: str, columns: int, mesh: Mesh) -> None:
    """Refuses rows whose columns the devices cannot share evenly.

    Args:
      field: names `columns` in the message.
      columns: of a row.
      mesh: its axis sequence holds different columns.
    """
    size = sequence_size(mesh)
    fix = f"must be a multiple of mesh.sequence={size}, the devices that hold different columns"
    require(columns % size == 0, field, columns, fix)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def check_rows(field: str, rows: int, mesh: Mesh, parts: int) -> None:
    """Refuses a batch that the devices cannot share evenly.

    Args:
      field: names `rows` in the message.
      rows: of a batch.
      mesh: its axes data and fsdp hold different rows.
      parts: that a batch is computed in, one after the other (`train.accumulate`).
    """
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * parts
    require(
        rows % unit == 0,
        field,
        rows,
        f"must be a multiple of {unit}, the devices that hold different rows times train.accumulate",
    )

"""Where arrays live: one mesh with three axes, and rules from logical names to mesh axes.

Modules name the dimensions of their parameters (`nn.partition`), `Rules` maps the names to axes of the mesh,
and `jit` divides the work accordingly. One device is a mesh of one; nothing else in the package asks how
many devices there are.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elastic_lm.config.checks import require
from elastic_lm.models.decoder import LAYER, Params
from elastic_lm.models.registry import Config, abstract_params

AXES = ("data", "fsdp", "tensor")


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


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor over all devices.

    Args:
      data: devices that hold different rows; -1, on at most one of the three axes, = all that are left.
      fsdp: devices that hold different rows and different slices of the parameters.
      tensor: devices that share heads, MLP width and vocabulary.
      devices: which devices; None = all.

    Returns:
      The mesh, whose axes `jit` divides work over by itself (`AxisType.Auto`).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(-math.prod(sizes), 1)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        asked = f"data={data}, fsdp={fsdp}, tensor={tensor}"
        raise ValueError(f"mesh {asked} does not fit {len(devices)} devices: the product must be that")
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def param_shardings(config: Config, mesh: Mesh, rules: Rules | None = None) -> Params:
    """Sharding of every canonical parameter.

    Args:
      config: the model; static.
      mesh: from `make_mesh`.
      rules: logical to mesh axes; None = the defaults.

    Returns:
      A tree of `NamedSharding` with the structure of the canonical parameters.

    Raises:
      ValueError: a dimension is not a multiple of the devices it is split over (names the tensor).
    """
    rules = rules or Rules()

    def one(path: tuple[Any, ...], box: Any) -> NamedSharding:
        spec = rules.spec(box.names)
        for size, axis in zip(box.value.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                name = ".".join(key.key for key in path)
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


def stacked_shardings(shardings: Params) -> Params:
    """Shardings of the stacked form (`decoder.stack_layers`); the layer dimension is scanned, so not split.

    Args:
      shardings: from `param_shardings`.
    """
    rest = {name: tree for name, tree in shardings.items() if not LAYER.fullmatch(name)}
    layer = jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(None, *s.spec)), shardings["layers_0"])
    return {**rest, "layers": layer}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, ...] arrays: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


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

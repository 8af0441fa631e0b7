"""Rows divided over devices: each holds a part of the columns of every activation (a mesh's axis `sequence`).

What a layer computes of a token needs no other token, but for attention, which reads the keys and values of
all. They are gathered, and queries stay where they are. Loops over columns take some of every device's part
in each turn, so that all devices work in all turns.

Sizes and places are those of the mesh that `over_sequence` names while a step is traced. Without it nothing
here changes a program.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastic_lm.nn.placement import ROWS

SEQUENCE = "sequence"  # the axis of a mesh
_MESH: ContextVar[Mesh | None] = ContextVar("mesh of the sequence", default=None)


@contextlib.contextmanager
def over_sequence(mesh: Mesh | None) -> Iterator[None]:
    """What is traced inside divides columns over the mesh's axis `sequence`, where it has one.

    Args:
      mesh: of the arrays; None = one device.
    """
    token = _MESH.set(mesh if mesh is not None and sequence_size(mesh) > 1 else None)
    try:
        yield
    finally:
        _MESH.reset(token)


def sequence_size(mesh: Mesh) -> int:
    """How many devices divide the columns."""
    return mesh.shape.get(SEQUENCE, 1)


def parts() -> int:
    """How many parts the columns of what is traced have."""
    mesh = _MESH.get()
    return 1 if mesh is None else sequence_size(mesh)


def divided(x: jax.Array) -> jax.Array:
    """[B, T, ...] activations, each device with its rows and columns."""
    return _placed(x, PartitionSpec(ROWS, SEQUENCE))


def gathered(x_BKSH: jax.Array) -> jax.Array:
    """Keys or values [B, K, S, H], all columns on every device; heads stay divided as they are."""
    mesh = _MESH.get()
    heads = "tensor" if mesh is not None and x_BKSH.shape[1] % mesh.shape["tensor"] == 0 else None
    return _placed(x_BKSH, PartitionSpec(ROWS, heads))


def _placed(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    mesh = _MESH.get()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def pieces(x: jax.Array, chunk: int, fill: Any = 0) -> jax.Array:
    """[B, T, ...] to [T / chunk, B, chunk, ...], filled up; columns of all devices in every piece.

    Args:
      x: T is a multiple of `parts()`.
      chunk: columns of a piece; a multiple of `parts()`.
      fill: value of the columns that fill up the last piece.
    """
    s, (b, t), rest = parts(), x.shape[:2], x.shape[2:]
    x = x.reshape(b, s, t // s, *rest) if s > 1 else x
    axis = x.ndim - len(rest) - 1
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % (chunk // s))
    x = jnp.pad(x, widths, constant_values=fill)
    if s == 1:
        return jnp.moveaxis(x.reshape(b, -1, chunk, *rest), 1, 0)
    x = jnp.moveaxis(x.reshape(b, s, -1, chunk // s, *rest), 2, 0)
    return _placed(x.reshape(-1, b, chunk, *rest), PartitionSpec(None, ROWS, SEQUENCE))


def joined(x: jax.Array, length: int) -> jax.Array:
    """Inverse of `pieces`: [pieces, B, chunk, ...] to [B, length, ...].

    Args:
      x: pieces.
      length: columns without those that filled up the last piece.
    """
    s, (n, b, chunk), rest = parts(), x.shape[:3], x.shape[3:]
    if s == 1:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(b, -1, *rest)[:, :length]
    x = jnp.moveaxis(x.reshape(n, b, s, chunk // s, *rest), 0, 2)
    x = x.reshape(b, s, -1, *rest)[:, :, : length // s]
    return divided(x.reshape(b, length, *rest))

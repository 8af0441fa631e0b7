"""Where activations lie on a mesh: every device has its rows, at their whole width.

Parameters are split over devices along their width (`fsdp`), which says nothing about what is computed from
them. Left to itself, the compiler carries a split width into the residual stream: devices then hold a part of
the width of all rows, sum what they computed of every token, and move activations to and fro, where they
should gather the parameters of a layer. So the stream's place is stated where it enters a layer and leaves
one.

The mesh is the one that `on_mesh` names while a step is traced. Without it, or on one device, nothing here
changes a program.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS = ("data", "fsdp")  # the axes of a mesh that divide rows
_MESH: ContextVar[Mesh | None] = ContextVar("mesh of what is traced", default=None)
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """What is traced inside lies on a mesh.

    Args:
      mesh: of the parameters and the batch; None, or one of one device, = nothing is stated.
    """
    token = _MESH.set(mesh if mesh is not None and mesh.size > 1 else None)
    try:
        yield
    finally:
        _MESH.reset(token)


def traced_on(function: AnyFunction, mesh: Mesh | None) -> AnyFunction:
    """A function whose trace lies on a mesh.

    Args:
      function: to be given to `jax.jit`.
      mesh: as for `on_mesh`.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with on_mesh(mesh):
            return function(*args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


def by_rows(x: jax.Array) -> jax.Array:
    """[B, T, D] activations: rows over the devices that divide rows, the width whole; columns as they are."""
    mesh = _MESH.get()
    if mesh is None or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    columns = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS, *columns, None)))


def whole_width(table_VD: jax.Array) -> jax.Array:
    """A table [V, D] with its width gathered, for a lookup; its gradient is split over devices again."""
    mesh = _MESH.get()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return table_VD
    rows = PartitionSpec.UNCONSTRAINED
    gathered = NamedSharding(mesh, PartitionSpec(rows, None))
    split = NamedSharding(mesh, PartitionSpec(rows, "fsdp"))
    return _moved(table_VD, gathered, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, there: NamedSharding, back: NamedSharding) -> jax.Array:
    """`x` in one place, and its gradient in another: the transpose of a constraint would be the same one."""
    return jax.lax.with_sharding_constraint(x, there)


def _move_there(x: jax.Array, there: NamedSharding, back: NamedSharding) -> tuple[jax.Array, None]:
    return _moved(x, there, back), None


def _move_back(there: NamedSharding, back: NamedSharding, _: None, slope: jax.Array) -> tuple[jax.Array]:
    # Summed over rows where it is computed, and only then split: otherwise rows move to where the parts are.
    slope = jax.lax.with_sharding_constraint(slope, there)
    return (jax.lax.with_sharding_constraint(slope, back),)


_moved.defvjp(_move_there, _move_back)

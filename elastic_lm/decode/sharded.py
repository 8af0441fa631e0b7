"""Decoding on a mesh: which device holds which part of the decode state.

    caches             [B, K, S, H]   rows over data and fsdp, key/value heads over tensor
    pending states     [B, W, D]      rows over data and fsdp
    all the rest       a few numbers per row, whole on every device

What decides about ticks lies whole on every device, so that no device waits for another to decide. Rows or
heads that a mesh cannot divide are whole on every device, too.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastic_lm.decode.cache import LayerCache
from elastic_lm.decode.state import DecodeState
from elastic_lm.models.placement import heads_over, rows_over, rows_sharding


def cache_sharding(mesh: Mesh, cache: LayerCache) -> NamedSharding:
    """Sharding of the keys and of the values of a layer, [B, K, S, H] each."""
    rows, heads = cache[0].shape[:2]
    return NamedSharding(mesh, PartitionSpec(rows_over(mesh, rows) or None, heads_over(mesh, heads)))


def state_shardings(mesh: Mesh, state: DecodeState) -> DecodeState:
    """Sharding of every array of a decode state, in the form of one.

    Args:
      mesh: from `sharding.make_mesh`.
      state: arrays, or descriptions of them.
    """

    def cache(layer: LayerCache | None) -> Any:
        return None if layer is None else (cache_sharding(mesh, layer),) * 2

    whole = NamedSharding(mesh, PartitionSpec())
    rows = rows_sharding(mesh, state.length.shape[0])
    return dataclasses.replace(
        jax.tree.map(lambda _: whole, state),
        cache=tuple(map(cache, state.cache)),
        exit_cache=tuple(map(cache, state.exit_cache)),
        hidden=(rows,) * len(state.hidden),
    )


def on_mesh(state: DecodeState, mesh: Mesh | None) -> DecodeState:
    """The state, divided over a mesh inside a program; None = as it is."""
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))


def rows_on_mesh(hidden_BTD: jax.Array, mesh: Mesh | None) -> jax.Array:
    """States of which every device computes those of its rows; None = as they are."""
    if mesh is None:
        return hidden_BTD
    return jax.lax.with_sharding_constraint(hidden_BTD, rows_sharding(mesh, hidden_BTD.shape[0]))

"""State propagation (CALM): deeper layers see an early token through the state that it left with.

A token that leaves after segment j with state h gives every deeper layer i the keys and values

    k_i = K_i(norm_i(h)),   v_i = V_i(norm_i(h))

in place of those of the states that were never computed for it. Later tokens attend to these, so they only
approximate the full model's. In return, nothing stays pending.

Paper: Confident adaptive language modeling, arXiv 2207.07061, sec. 3.3.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elastic_lm.decode import cache
from elastic_lm.decode.segment import Segment
from elastic_lm.decode.state import DecodeState, segments


class DeeperCaches(NamedTuple):
    """The caches above a segment.

    Attributes:
      layers: one per layer.
      exits: one per exit; None where the exit has no block of its own.
    """

    layers: tuple[cache.LayerCache, ...]
    exits: tuple[cache.LayerCache | None, ...]


def propagate(segment: Segment, state: DecodeState, leaving_B: jax.Array) -> DecodeState:
    """Fills the caches above a segment at the newest position of the rows that leave there.

    Args:
      segment: not the last one.
      state: after the rows' newest tokens passed the segment.
      leaving_B: bool, rows that leave.

    Returns:
      The state, in which every deeper segment has processed what this segment has in these rows.
    """
    decoder, j = segment.decoder, segment.index
    pieces = segments(segment.config)
    n_exits = len(state.exit_cache)
    position = state.done[j][:, None] - 1

    def fill(caches: DeeperCaches) -> DeeperCaches:
        ring = state.hidden[j]
        hidden = jnp.take_along_axis(ring, (position % ring.shape[1])[..., None], axis=1)

        # Caches are written for all rows. Where a row does not leave, the entries land at its own progress
        # (`done` of each segment), where they are stale and overwritten before they count.
        start = jnp.where(leaving_B, position[:, 0], state.done)  # [J + 1, B]

        segment_of_layer = [k for k, (first, stop) in enumerate(pieces) for _ in range(first, stop) if k > j]
        layers_kv = decoder.key_values(hidden, position, segment.stop, segment.config.n_layers)
        layers = tuple(
            cache.write(layer, kv, start[k])
            for layer, kv, k in zip(caches.layers, layers_kv, segment_of_layer, strict=True)
        )

        deeper_exits = range(j + 1, n_exits)
        exits_kv = [decoder.exit_key_values(k, hidden, position) for k in deeper_exits]
        exits = tuple(
            block if block is None or kv is None else cache.write(block, kv, start[k])
            for k, block, kv in zip(deeper_exits, caches.exits, exits_kv, strict=True)
        )
        return DeeperCaches(layers, exits)

    before = DeeperCaches(state.cache[segment.stop :], state.exit_cache[j + 1 :])
    filled = jax.lax.cond(jnp.any(leaving_B), fill, lambda caches: caches, before)

    deeper = jnp.arange(state.done.shape[0])[:, None] > j
    return dataclasses.replace(
        state,
        cache=(*state.cache[: segment.stop], *filled.layers),
        exit_cache=(*state.exit_cache[: j + 1], *filled.exits),
        done=jnp.where(deeper & leaving_B, state.done[j], state.done),
    )

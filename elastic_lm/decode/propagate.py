"""State propagation: early tokens lend deeper layers the state they left with (CALM).

A token that leaves after segment j with state h gives every deeper layer i the keys and values

    k_i = K_i(norm_i(h)),   v_i = V_i(norm_i(h))

in place of those of the states that it never computed. Later tokens attend to these, so their answers
approximate the full model's. Nothing stays pending.

Paper: Confident adaptive language modeling, arXiv 2207.07061, sec. 3.3.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.decode import cache
from elastic_lm.decode.state import DecodeState, segments
from elastic_lm.models.decoder import Params
from elastic_lm.width.nested_decoder import decoder_of

# Caches of layers, caches of the blocks of exits.
Deeper = tuple[tuple[cache.LayerCache, ...], tuple[cache.LayerCache | None, ...]]


def propagate(
    config: ModelConfig, params: Params, state: DecodeState, rows_B: jax.Array, j: int
) -> DecodeState:
    """Fills the caches above segment `j` at the newest position of the rows that leave there.

    Args:
      config: static.
      params: canonical parameters.
      state: after the rows' newest tokens passed segment j.
      rows_B: bool, rows that leave. Others get stale entries above their progress, which are overwritten
        before they count.
      j: segment, static; not the last.

    Returns:
      The state, in which every deeper segment has processed what segment j has in these rows.
    """
    decoder = decoder_of(config).bind({"params": params})
    pieces = segments(config)
    cut = pieces[j][1]
    position = state.done[j][:, None] - 1

    def fill(deeper: Deeper) -> Deeper:
        ring = state.hidden[j]
        hidden = jnp.take_along_axis(ring, (position % ring.shape[1])[..., None], axis=1)
        start = jnp.where(rows_B, position[:, 0], state.done)  # [J + 1, B]
        above = [k for k, (first, stop) in enumerate(pieces) for _ in range(first, stop) if k > j]
        layers = decoder.key_values(hidden, position, cut, config.n_layers)
        own = tuple(cache.write(c, kv, start[k]) for c, kv, k in zip(deeper[0], layers, above, strict=True))
        blocks = [decoder.exit_key_values(k, hidden, position) for k in range(j + 1, len(state.exit_cache))]
        return own, tuple(
            c if c is None or kv is None else cache.write(c, kv, start[k])
            for k, (c, kv) in enumerate(zip(deeper[1], blocks, strict=True), start=j + 1)
        )

    held = state.cache[cut:], state.exit_cache[j + 1 :]
    layers, blocks = jax.lax.cond(jnp.any(rows_B), fill, lambda deeper: deeper, held)
    deeper = jnp.arange(state.done.shape[0])[:, None] > j
    return dataclasses.replace(
        state,
        cache=(*state.cache[:cut], *layers),
        exit_cache=(*state.exit_cache[: j + 1], *blocks),
        done=jnp.where(deeper & rows_B, state.done[j], state.done),
    )

"""Prefill: one full-depth pass over the padded prompts that fills every cache."""

import jax
import jax.numpy as jnp

from elastic_lm.config import ModelConfig
from elastic_lm.decode import cache
from elastic_lm.decode.state import FREE, DecodeState, segments
from elastic_lm.models.decoder import Params, default_positions
from elastic_lm.models.routed_decoder import decoder_of


def prefill(
    config: ModelConfig,
    params: Params,
    tokens_BP: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    draft: jax.Array,
    *,
    capacity: int,
    window: int,
) -> DecodeState:
    """Builds the decode state of a batch of prompts.

    The newest prompt token is left to the first tick, whose exits may already be confident about
    what follows it; everything before it is processed by all layers.

    Args:
      config: static.
      params: canonical parameters.
      tokens_BP: int32 prompts, padded on the right to the bucket P.
      length_B: int32 prompt lengths, 1 .. P.
      limit_B: int32 length at which each row ends; rows with limit <= length are never alive.
      draft: int32 scalar, tokens that a lossless row may draft at first; traced.
      capacity: positions per cache; static; at least max(limit_B) + window.
      window: pending positions per row, W; static.

    Returns:
      DecodeState ready for `loop.run`.
    """
    b, p = tokens_BP.shape
    decoder = decoder_of(config).bind({"params": params})
    positions = default_positions(tokens_BP, None)
    hidden = decoder.embed(tokens_BP, positions)
    caches: list[cache.LayerCache] = []
    exit_caches: list[cache.LayerCache | None] = []
    for j, (start, stop) in enumerate(segments(config)):
        tap, rows = decoder.run_layers(hidden, positions, start, stop)
        hidden = tap.hidden
        caches += [cache.from_prefill(r, capacity) for r in rows]
        if stop < config.n_layers:
            _, own = decoder.exit_state(j, tap, positions)
            exit_caches.append(None if own is None else cache.from_prefill(own, capacity))
    n_exits = len(exit_caches)
    return DecodeState(
        tokens=jnp.pad(tokens_BP, [(0, 0), (0, capacity - p)]),
        exit_layers=jnp.zeros((b, capacity), jnp.int32),
        length=length_B,
        limit=limit_B,
        alive=length_B < limit_B,
        ended=jnp.zeros((b,), bool),
        wait=jnp.full((b,), FREE, jnp.int32),
        done=jnp.broadcast_to(length_B - 1, (n_exits + 1, b)),
        hidden=tuple(jnp.zeros((b, window, config.d_model), config.dtype) for _ in range(n_exits)),
        cache=tuple(caches),
        exit_cache=tuple(exit_caches),
        draft=jnp.broadcast_to(draft, (b,)),
        drafted=jnp.zeros((b,), jnp.int32),
        accepted=jnp.zeros((b,), jnp.int32),
        ticks=jnp.zeros((n_exits + 1,), jnp.int32),
    )

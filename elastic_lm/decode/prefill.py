"""Prefill: one full-depth pass over the padded prompts that fills every cache."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from elastic_lm.config.model import ModelConfig
from elastic_lm.decode import cache
from elastic_lm.decode.lookup import no_proposals
from elastic_lm.decode.sharded import on_mesh, rows_on_mesh
from elastic_lm.decode.state import FREE, DecodeState, segments
from elastic_lm.models.decoder import Params, default_positions
from elastic_lm.width.nested_decoder import decoder_of


@flax.struct.dataclass
class PromptState:
    """What the first layers of a model have computed for a batch of padded prompts, or for one prompt.

    The state of one prompt has no leading dimension B and only as many positions as the prompt; `stack_rows`
    and `split_rows` lead from one form to the other.

    Attributes:
      layers: number of layers that have run; static under jit.
      hidden: [B, P, D] state that enters the next layer.
      kv: keys and values of each of these layers, [B, K, P, H] each; () where nothing is decoded.
    """

    layers: int = flax.struct.field(pytree_node=False)
    hidden: jax.Array
    kv: tuple[cache.LayerCache, ...] = ()


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
    lookup: bool = False,
    copies: int = 1,
    mesh: Mesh | None = None,
) -> DecodeState:
    """Builds the decode state of a batch of prompts.

    Args:
      config: static.
      params: canonical parameters.
      tokens_BP: int32 prompts, padded on the right to the bucket P.
      length_B: int32 prompt lengths, 1 .. P.
      limit_B: int32 length at which each row ends; rows with limit <= length are never alive.
      draft: int32 scalar, tokens that a lossless row may draft at first; traced.
      capacity: positions per cache; static; at least max(limit_B) + window.
      window: pending positions per row, W; static.
      lookup: lossless rows draft from their own text; static.
      copies: rows that each prompt becomes, one after the other; static.
      mesh: as in `loop.run`; static.

    Returns:
      DecodeState ready for `loop.run`.
    """
    decoder = decoder_of(config).bind({"params": params})
    positions = default_positions(tokens_BP, None)
    hidden = rows_on_mesh(decoder.embed(tokens_BP, positions), mesh)

    caches: list[cache.LayerCache] = []
    exit_caches: list[cache.LayerCache | None] = []
    for j, (start, stop) in enumerate(segments(config)):
        tap, new_kv = decoder.run_layers(hidden, positions, start, stop, lengths_BT=length_B[:, None])
        hidden = tap.hidden
        caches += [cache.from_prefill(_copied(kv, copies), capacity) for kv in new_kv]
        if stop < config.n_layers:
            _, exit_kv = decoder.exit_state(j, tap, positions, lengths_BT=length_B[:, None])
            exit_kv = _copied(exit_kv, copies)
            exit_caches.append(None if exit_kv is None else cache.from_prefill(exit_kv, capacity))

    tokens_BP, length_B, limit_B = _copied((tokens_BP, length_B, limit_B), copies)
    state = decode_state(
        config, tokens_BP, length_B, limit_B, draft,
        caches=caches, exit_caches=exit_caches, capacity=capacity, window=window, lookup=lookup,
    )  # fmt: skip
    return on_mesh(state, mesh)


def _copied(tree: Any, copies: int) -> Any:
    """Every row of a tree of [B, ...] arrays so many times, one after the other."""
    return tree if copies == 1 else jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), tree)


def prefill_from_state(
    config: ModelConfig,
    params: Params,
    prompt_state: PromptState,
    tokens_BP: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    draft: jax.Array,
    *,
    capacity: int,
    window: int,
) -> DecodeState:
    """`prefill` of prompts that the first layers, or all of them, have processed already.

    `config` has no exits, `prompt_state` is of the padded prompts, and the rest is as in `prefill`.
    """
    all_kv = list(prompt_state.kv)
    if prompt_state.layers < config.n_layers:
        decoder = decoder_of(config).bind({"params": params})
        positions = default_positions(tokens_BP, None)
        start, lengths = prompt_state.layers, length_B[:, None]
        hidden = prompt_state.hidden
        all_kv += decoder.run_layers(hidden, positions, start, config.n_layers, lengths_BT=lengths)[1]

    caches = [cache.from_prefill(kv, capacity) for kv in all_kv]
    return decode_state(
        config, tokens_BP, length_B, limit_B, draft,
        caches=caches, exit_caches=[], capacity=capacity, window=window,
    )  # fmt: skip


def decode_state(
    config: ModelConfig,
    tokens_BP: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    draft: jax.Array,
    *,
    caches: Sequence[cache.LayerCache],
    exit_caches: Sequence[cache.LayerCache | None],
    capacity: int,
    window: int,
    lookup: bool = False,
) -> DecodeState:
    """The decode state around filled caches: one per layer, and one per exit (None where it has no block)."""
    (b, p), n_exits = tokens_BP.shape, len(exit_caches)
    return DecodeState(
        tokens=jnp.pad(tokens_BP, [(0, 0), (0, capacity - p)]),
        exit_layers=jnp.zeros((b, capacity), jnp.int32),
        length=length_B,
        limit=limit_B,
        alive=length_B < limit_B,
        ended=jnp.zeros((b,), bool),
        wait=jnp.full((b,), FREE, jnp.int32),
        # The newest prompt token is left to the first tick, whose exits may already be confident about what
        # follows it.
        done=jnp.broadcast_to(length_B - 1, (n_exits + 1, b)),
        hidden=tuple(jnp.zeros((b, window, config.d_model), config.dtype) for _ in range(n_exits)),
        cache=tuple(caches),
        exit_cache=tuple(exit_caches),
        draft=jnp.broadcast_to(draft, (b,)),
        drafted=jnp.zeros((b,), jnp.int32),
        accepted=jnp.zeros((b,), jnp.int32),
        copied=jnp.zeros((b,), jnp.int32),
        verifications=jnp.zeros((b,), jnp.int32),
        lookup=no_proposals(b, window) if lookup else None,
        ticks=jnp.zeros((n_exits + 1,), jnp.int32),
    )


@jax.jit
def split_rows(tree: Any) -> list[Any]:
    """The rows of a tree of [B, ...] arrays, one tree each, in one program."""
    n_rows = jax.tree.leaves(tree)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(n_rows)]


@jax.jit
def stack_rows(rows: list[Any]) -> Any:
    """A tree of [B, ...] arrays from one tree per row, in one program; the inverse of `split_rows`."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *rows)

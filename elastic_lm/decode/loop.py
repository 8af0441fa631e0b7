"""The decode loop: shallow ticks over new tokens, deep ticks over pending windows.

One mechanism serves every row of a batch independently. A row whose exit is confident emits and goes
on; the deeper segments of that position stay pending. A row that is not confident waits for the next
deep tick, which runs the deeper segment over all pending positions of all rows at once, fills their
keys and values exactly, and answers the rows that waited. A row's tokens therefore depend neither on
the other rows, nor on the window, nor on when deep ticks fire.

Per row, length >= done[0] >= ... >= done[J], and done[0] - done[J] <= W bounds the pending work.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.decode import cache
from elastic_lm.decode.cache import LayerCache
from elastic_lm.decode.exit_check import Found, check_exit
from elastic_lm.decode.lossless import deep_tokens, drafting_room, look_deep, verify
from elastic_lm.decode.propagate import propagate
from elastic_lm.decode.sampling import sample
from elastic_lm.decode.state import (
    FREE,
    Controls,
    DecodeState,
    Emissions,
    Mode,
    emit,
    no_emissions,
    retire,
    segments,
)
from elastic_lm.depth.confidence import METRICS, state_similarity
from elastic_lm.models.decoder import Params
from elastic_lm.width.nested_decoder import decoder_of

# What segment j writes: caches of its layers, cache of its exit's block, states that leave it [B, W, D].
Held = tuple[tuple[LayerCache, ...], LayerCache | None, jax.Array | None]


def run(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    controls: Controls,
    iterations: jax.Array,
    mode: Mode = "exact",
) -> DecodeState:
    """Runs iterations of shallow and deep ticks until every row has ended.

    Args:
      config: static.
      params: canonical parameters; read in place, never copied per step.
      state: from `prefill` or an earlier `run`.
      controls: traced.
      iterations: int32, traced; stops after this many iterations even if rows are alive, so that a
        caller can stream.
      mode: static. "exact" = deeper layers of early tokens run later, in windows; "verify" = the same,
        and the rows that `controls.lossless` marks keep only what the full model would have emitted;
        "propagate" = deeper layers of early tokens never run, CALM's approximation takes their place.

    Returns:
      The advanced state.
    """

    def unfinished(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
        return jnp.any(carry[0].alive) & (carry[1] < iterations)

    def iteration(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        state, count = carry
        answers = no_emissions(config, state)
        for j in range(len(segments(config))):
            state, answers = _segment(config, params, state, controls, answers, j, mode)
        return _emit(state, answers, controls), count + 1

    return jax.lax.while_loop(unfinished, iteration, (state, jnp.int32(0)))[0]


def _emit(state: DecodeState, answers: Emissions, controls: Controls) -> DecodeState:
    """Draws a token for every row that has an answer; one place, so that it is compiled once."""

    def draw() -> jax.Array:
        return sample(answers.logits, state.tokens, state.length, controls.sampling)

    tokens_B = jax.lax.cond(jnp.any(answers.rows), draw, lambda: jnp.zeros_like(state.length))
    state = emit(state, answers.rows, tokens_B, answers.depth, controls.stop_tokens)
    return retire(state, controls.lossless)


def _segment(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    controls: Controls,
    answers: Emissions,
    j: int,
    mode: Mode,
) -> tuple[DecodeState, Emissions]:
    """Runs segment `j` (static) where it is due, then lets the rows that asked for it answer."""
    window = _window(state)
    room_B = drafting_room(state, controls, window)
    if j == 0:
        asking = movable(state, room_B)
        target = state.done[0] + asking
        fires = jnp.any(asking)
    else:
        asking = state.alive & (state.wait == j - 1)
        target = state.done[j - 1]
        fires = deep_fires(state, controls, answers.rows, j, room_B)
        asking &= fires
    begin = state.done[j]
    widths = (1,) if j == 0 or mode == "propagate" else variants(window)
    held, found = _narrowest(config, params, state, controls, target, j, fires, widths, mode)
    state = _put_back(config, state, held, j)
    target = jnp.where(fires, target, begin)
    state = dataclasses.replace(state, done=state.done.at[j].set(target), ticks=state.ticks.at[j].add(fires))
    if found.deep is not None:
        state, rejected = verify(state, controls, deep_tokens(found.deep, window), begin, target)
        # A row that an exit answered in this very iteration takes the full model's answer instead.
        asking |= answers.rows & controls.lossless & (target == state.length)
        asking &= ~rejected
        answers = dataclasses.replace(answers, rows=answers.rows & ~rejected)
    before = answers.rows
    answers = check_exit(config, params, controls, answers, j, asking, found, state, room_B, window)
    state = dataclasses.replace(state, wait=jnp.where(asking, jnp.where(answers.rows, FREE, j), state.wait))
    if mode == "propagate" and j < len(segments(config)) - 1:
        state = propagate(config, params, state, answers.rows & ~before, j)
    return state, answers


def _window(state: DecodeState) -> int:
    """W, positions that may be pending."""
    return state.hidden[0].shape[1] if state.hidden else 1


def _narrowest(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    controls: Controls,
    target_B: jax.Array,
    j: int,
    fires: jax.Array,
    widths: tuple[int, ...],
    mode: Mode,
) -> tuple[Held, Found]:
    """Runs the tick of the smallest width that takes all pending positions, or none.

    One `cond` after the other and not a `switch`: XLA copies a cache that several branches write.
    """
    held = _hold(config, state, j)

    def tick(held: Held, width: int) -> tuple[Held, Found]:
        return _tick(config, params, state, controls, held, target_B, j, width, mode)

    nothing = _nothing(config, state, j, mode)

    def ticks() -> tuple[Held, Found]:
        if len(widths) == 1:
            return tick(held, widths[0])
        pending = jnp.max(target_B - state.done[j])
        choice = jnp.sum(jnp.asarray(widths) < pending)
        result = held, nothing
        for i, width in enumerate(widths):
            result = jax.lax.cond(
                choice == i,
                lambda held, _, width=width: tick(held, width),
                lambda held, found: (held, found),
                *result,
            )
        return result

    return jax.lax.cond(fires, ticks, lambda: (held, nothing))


def _nothing(config: ModelConfig, state: DecodeState, j: int, mode: Mode) -> Found:
    """What stands in where no tick ran."""
    b = state.length.shape[0]
    if segments(config)[j][1] < config.n_layers:
        return Found(jnp.zeros((b, 1, config.d_model), config.dtype), jnp.zeros((b,), jnp.float32))
    if mode == "verify":
        return Found(deep=jnp.zeros((b, config.vocab_size + _window(state)), jnp.float32))
    return Found(jnp.zeros((b, 1, config.d_model), config.dtype))


def _hold(config: ModelConfig, state: DecodeState, j: int) -> Held:
    """The parts of the state that segment `j` writes."""
    start, stop = segments(config)[j]
    if stop == config.n_layers:
        return state.cache[start:stop], None, None
    return state.cache[start:stop], state.exit_cache[j], state.hidden[j]


def _put_back(config: ModelConfig, state: DecodeState, held: Held, j: int) -> DecodeState:
    """Inverse of `_hold`."""
    start, stop = segments(config)[j]
    caches, exit_cache, ring = held
    state = dataclasses.replace(state, cache=(*state.cache[:start], *caches, *state.cache[stop:]))
    if ring is None:
        return state
    return dataclasses.replace(
        state,
        exit_cache=(*state.exit_cache[:j], exit_cache, *state.exit_cache[j + 1 :]),
        hidden=(*state.hidden[:j], ring, *state.hidden[j + 1 :]),
    )


def variants(window: int) -> tuple[int, ...]:
    """Widths for which a deep tick is compiled: a few positions, and the whole window.

    Most deep ticks find one to three positions pending, and on CPU further positions are not free: each of
    the next few costs a quarter to two thirds of the first one, a whole window of 16 four times as much
    (`nn.linear`). Each width compiles the deeper layers once more.
    """
    return (*(width for width in (1, 2, 3, 4, 8) if width < window), window)


def movable(state: DecodeState, room_B: jax.Array) -> jax.Array:
    """Rows whose newest token can enter segment 0.

    Args:
      state: between two ticks.
      room_B: int32, see `verify.drafting_room`.

    Returns:
      [B] bool.
    """
    fresh = state.done[0] == state.length - 1
    room = state.done[0] - state.done[-1] < room_B
    return state.alive & ~state.ended & (state.wait == FREE) & fresh & (room | (state.done.shape[0] == 1))


def deep_fires(
    state: DecodeState, controls: Controls, answered_B: jax.Array, j: int, room_B: jax.Array
) -> jax.Array:
    """Whether segment `j` runs now.

    It does when a row's window is full, when enough rows wait for it, or when rows wait and none can go
    on without it. A row that has ended waits for the verification of its last tokens.

    Args:
      state: between two ticks.
      controls: its `fire_share` is read.
      answered_B: bool, rows that have an answer in this iteration and go on in the next.
      j: segment, static, at least 1.
      room_B: int32, see `verify.drafting_room`.

    Returns:
      [] bool.
    """
    pending = state.done[j - 1] > state.done[j]
    full = state.alive & (state.done[0] - state.done[-1] >= room_B) & pending
    waiting = state.alive & ((state.wait == j - 1) | (state.ended & pending))
    share = controls.fire_share * jnp.sum(state.alive)
    enough = jnp.sum(waiting) >= jnp.maximum(share, 1.0)
    stuck = jnp.any(waiting) & ~jnp.any(movable(state, room_B) | answered_B)
    return jnp.any(full) | enough | stuck


def _tick(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    controls: Controls,
    held: Held,
    target_B: jax.Array,
    j: int,
    width: int,
    mode: Mode,
) -> tuple[Held, Found]:
    """Runs segment `j` over positions done[j] .. done[j] + width - 1 of every row.

    Positions at or above `target_B` are not pending: what they give lands in stale cache positions.

    Returns:
      (the written parts of the state, what was found for each row's newest position).
    """
    caches, exit_cache, ring = held
    decoder = decoder_of(config).bind({"params": params})
    start, stop = segments(config)[j]
    done_B = state.done[j]
    positions = done_B[:, None] + jnp.arange(width, dtype=jnp.int32)
    if j == 0:
        tokens = jnp.take_along_axis(state.tokens, positions, axis=1)
        hidden = decoder.embed(tokens, positions)
    else:
        below = state.hidden[j - 1]
        hidden = jnp.take_along_axis(below, (positions % below.shape[1])[..., None], axis=1)
    tap, new_kv = decoder.run_layers(
        hidden, positions, start, stop, past=[cache.past(c, done_B) for c in caches]
    )
    caches = cache.write_all(caches, new_kv, tap.hidden, done_B)
    newest_B = jnp.clip(target_B - 1 - done_B, 0, width - 1)

    def newest(x_BTD: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BTD, newest_B[:, None, None], axis=1) if width > 1 else x_BTD

    if ring is None:
        if mode != "verify":
            return (caches, None, None), Found(decoder.final_features(newest(tap.hidden)))
        features = decoder.final_features(tap.hidden)
        deep = look_deep(
            decoder, features, positions, newest_B, state.tokens, controls.sampling, _window(state)
        )
        return (caches, None, None), Found(deep=deep)
    past = None if exit_cache is None else cache.past(exit_cache, done_B)
    exit_hidden, exit_key_values = decoder.exit_state(j, tap, positions, past=past)
    if exit_cache is not None and exit_key_values is not None:
        exit_cache = cache.write(exit_cache, exit_key_values, cache.after(exit_hidden, done_B))
    ring = ring_write(ring, tap.hidden, done_B, target_B - done_B)
    features = decoder.exit_head_input(j, newest(exit_hidden), jax.tree.map(newest, tap))
    cosine = jax.lax.cond(
        controls.metric == METRICS.index("cosine"),
        lambda: state_similarity(newest(tap.hidden), newest(tap.entering))[:, 0],
        lambda: jnp.zeros(newest_B.shape, jnp.float32),
    )
    return (caches, exit_cache, ring), Found(features, cosine)


def ring_write(ring_BWD: jax.Array, new_BTD: jax.Array, start_B: jax.Array, count_B: jax.Array) -> jax.Array:
    """Puts new states into the slots position % W of a ring.

    Args:
      ring_BWD: states of the last W positions.
      new_BTD: states of positions start_B + i.
      start_B: int32.
      count_B: int32, at most T and W; only so many of the new states are put.

    Returns:
      [B, W, D], the ring with the other slots as they were.
    """
    window, width = ring_BWD.shape[1], new_BTD.shape[1]
    index_BW = (jnp.arange(window) - start_B[:, None]) % window
    taken = jnp.take_along_axis(new_BTD, jnp.minimum(index_BW, width - 1)[..., None], axis=1)
    return jnp.where((index_BW < count_B[:, None])[..., None], taken, ring_BWD)

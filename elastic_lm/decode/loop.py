"""The decode loop: shallow ticks over new tokens, deep ticks over pending positions.

The J exits of a model cut its layers into J + 1 segments. An iteration of the loop visits the segments from
the lowest to the deepest, and each of them runs if it is due; one such run is a tick.

A row whose exit is confident emits its token and goes on; the deeper segments of that position stay pending.
A row whose exit is not confident waits for a tick of the next segment. This deep tick processes the pending
positions of all rows at once, fills their keys and values exactly, and gives the waiting rows their tokens,
or lets them wait for the segment above. Rows do this independently: the tokens of a row depend neither on
the other rows, nor on the size of the window, nor on when deep ticks fire.

With done[j] the positions that segment j has processed, length >= done[0] >= ... >= done[J] holds in every
row, and done[0] - done[J] <= W bounds the pending work.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from elastic_lm.config.drafter import Drafter
from elastic_lm.config.model import ModelConfig
from elastic_lm.decode import cache, drafting, exit_balance, logprobs, lookup
from elastic_lm.decode.cache import LayerCache
from elastic_lm.decode.exit_check import check_exit, looks
from elastic_lm.decode.lossless import deep_logprobs, deep_tokens, drafting_room, look_deep, verify
from elastic_lm.decode.propagate import propagate
from elastic_lm.decode.sampling import sample
from elastic_lm.decode.segment import PREVIEW, Segment, TickOutput
from elastic_lm.decode.sharded import on_mesh
from elastic_lm.decode.state import (
    FREE,
    UNDRAWN,
    Controls,
    DecodeState,
    Emissions,
    Mode,
    emit,
    no_emissions,
    retire,
    segments,
)
from elastic_lm.depth.confidence import reads_states, state_confidence
from elastic_lm.models.decoder import Params

Carry = tuple[DecodeState, jax.Array]  # and the iterations that have run


class SegmentState(NamedTuple):
    """The parts of the decode state that one segment writes.

    Attributes:
      caches: one per layer of the segment.
      exit_cache: of the exit's own block; None where the exit has none.
      ring: [B, W, D] states that leave the segment at the pending positions; None after the last layer.
    """

    caches: tuple[LayerCache, ...]
    exit_cache: LayerCache | None
    ring: jax.Array | None


def run(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    controls: Controls,
    iterations: jax.Array,
    mode: Mode = "exact",
    mesh: Mesh | None = None,
    drafter: Drafter | None = None,
) -> DecodeState:
    """Runs iterations of shallow and deep ticks until every row has ended.

    Args:
      config: static.
      params: canonical parameters; read in place, never copied per step.
      state: from `prefill` or an earlier `run`.
      controls: traced.
      iterations: int32, traced; stops after this many iterations even if rows are alive, so that a
        caller can stream.
      mode: static. "exact" = the deeper layers of early tokens run later, in windows; "verify" = the same,
        and the rows that `controls.lossless` marks keep only what the full model would have emitted;
        "propagate" = the deeper layers of early tokens never run, CALM's approximation takes their place.
      mesh: that parameters lie on, static; the state is divided over it (`decode.sharded`). None = of one
        device, or left to the compiler.
      drafter: sub-network that drafts for the model (`decode.drafting`), which then has no exits; static.
        The state has a `drafting`, and the mode is "verify". Where the sub-network's parameters are not
        beside those of the model, they are sliced here, once per run. None = no sub-network drafts.

    Returns:
      The advanced state.
    """
    if drafter is not None and drafting.DRAFTER not in params:
        params = drafting.drafter_params(config, params, drafter)

    def unfinished(carry: Carry) -> jax.Array:
        return jnp.any(carry[0].alive) & (carry[1] < iterations)

    def iteration(carry: Carry) -> Carry:
        state, count = carry
        return _iteration(config, params, controls, mode, state, _asking(state, controls)), count + 1

    body = iteration
    if state.lookup is not None and len(segments(config)) == 1:
        # Only copies draft, and an iteration that has none in it needs no verification.
        body = functools.partial(_copying, config, params, controls, unfinished)
    elif state.lookup is not None:
        body = functools.partial(_copying_before_exits, config, params, controls)
    elif drafter is not None:
        body = functools.partial(_drafting, config, params, controls, drafter)

    # On a mesh, what enters an iteration and what leaves it is divided alike; the compiler would divide more.
    def divided(carry: Carry) -> Carry:
        state, count = body((on_mesh(carry[0], mesh), carry[1]))
        return on_mesh(state, mesh), count

    state, _ = jax.lax.while_loop(unfinished, divided, (on_mesh(state, mesh), jnp.int32(0)))
    return on_mesh(state, mesh)


def _drafting(
    config: ModelConfig, params: Params, controls: Controls, drafter: Drafter, carry: Carry
) -> Carry:
    """Drafts of a sub-network, and a pass of the whole model that verifies them and adds a token."""
    before, count = carry
    asking_B = _asking(before, controls)
    state = drafting.draft(config, params, drafter, before, controls, asking_B)
    drafted_B = state.length - before.length
    state = _iteration(config, params, controls, "verify", state, asking_B)
    return drafting.learn(state, before, drafted_B), count + 1


def _copying_before_exits(config: ModelConfig, params: Params, controls: Controls, carry: Carry) -> Carry:
    """A search, if one is due, and an iteration in which exits draft for the rows that copy nothing."""
    before, count = carry
    asking_B = _asking(before, controls)
    state = lookup.draft(before, controls, asking_B)
    copied = jnp.any(lookup.has_copied(state, controls) & (asking_B | (state.wait != FREE)))
    state = _iteration(config, params, controls, "verify", state, asking_B)
    return exit_balance.settle(state, before, asking_B, copied), count + 1


def _copying(
    config: ModelConfig,
    params: Params,
    controls: Controls,
    unfinished: Callable[[Carry], jax.Array],
    carry: Carry,
) -> Carry:
    """One search, then an iteration that verifies what it found, or those of full depth until the next."""
    state, count = carry
    asking_B = _asking(state, controls)
    before_B = state.length
    state = lookup.draft(state, controls, asking_B)
    drafted = jnp.any(state.length > before_B)

    # A loop of one iteration or none, and not a conditional: XLA hands caches through a loop in place.
    def verifies(carry: Carry) -> jax.Array:
        return drafted & (carry[1] == count)

    def verified(carry: Carry) -> Carry:
        return _iteration(config, params, controls, "verify", carry[0], asking_B), carry[1] + 1

    state, count = jax.lax.while_loop(verifies, verified, (state, count))

    # Beside lossless rows, every row takes the whole head, here as where drafts are verified.
    whole = {name: value for name, value in params.items() if name != PREVIEW}
    assert state.lookup is not None
    left = jnp.where(drafted, 0, 1 + state.lookup.rest)
    last = count + left

    def rests(carry: Carry) -> jax.Array:
        return unfinished(carry) & (carry[1] < last)

    def rested(carry: Carry) -> Carry:
        asking_B = _asking(carry[0], controls)
        return _iteration(config, whole, controls, "exact", carry[0], asking_B), carry[1] + 1

    state, count = jax.lax.while_loop(rests, rested, (state, count))

    # What is left of a rest when the iterations have run out is for the next run.
    assert state.lookup is not None
    searching = dataclasses.replace(state.lookup, rest=last - count)
    return dataclasses.replace(state, lookup=searching), count


def _asking(state: DecodeState, controls: Controls) -> jax.Array:
    """[B] bool: rows whose newest token enters the lowest segment in the next iteration."""
    return can_advance(state, drafting_room(state, controls, _window(state)))


def _iteration(
    config: ModelConfig,
    params: Params,
    controls: Controls,
    mode: Mode,
    state: DecodeState,
    asking_B: jax.Array,
) -> DecodeState:
    """Visits every segment once; `asking_B` are the rows whose newest token enters the lowest."""
    emissions = no_emissions(config, state)

    # The segments are unrolled, not scanned: each has its own condition, exit and caches.
    for j in range(len(segments(config))):
        segment = Segment(config, params, controls, mode, j)
        state, emissions = _run_segment(segment, state, emissions, asking_B)

    return _emit(state, emissions, controls, drawn=mode == "verify" and len(segments(config)) == 1)


def _emit(state: DecodeState, emissions: Emissions, controls: Controls, *, drawn: bool) -> DecodeState:
    """Draws the tokens of the rows that emit, and ends the rows whose last token this was.

    `drawn` (static) says that every emission has its token already.
    """
    tokens_B = emissions.tokens
    if not drawn:
        undrawn_B = emissions.rows & (tokens_B == UNDRAWN)

        def draw() -> jax.Array:
            return sample(emissions.logits, state.tokens, state.length, controls.sampling)

        # Tokens are drawn here for all rows, whichever segment they emit from, so that the code of sampling
        # is compiled once and not once per segment.
        drawn_B = jax.lax.cond(jnp.any(undrawn_B), draw, lambda: jnp.zeros_like(state.length))
        tokens_B = jnp.where(undrawn_B, drawn_B, tokens_B)
        state = logprobs.emitted(state, emissions.logits, tokens_B, undrawn_B)

    state = emit(state, emissions.rows, tokens_B, emissions.depth, controls.stop_tokens)
    return retire(state, controls.lossless)


def _run_segment(
    segment: Segment, state: DecodeState, emissions: Emissions, asking_B: jax.Array
) -> tuple[DecodeState, Emissions]:
    """Runs a segment if it is due, then decides which of the rows that waited for it emit."""
    controls, j = segment.controls, segment.index
    window = _window(state)
    room_B = drafting_room(state, controls, window)

    # Which rows ask this segment for a token, up to which position it has to run, and whether it does now.
    if j == 0:
        target_B = jnp.where(asking_B, state.length, state.done[0])
        fires = jnp.any(asking_B)
    else:
        asking_B = state.alive & (state.wait == j - 1)
        target_B = state.done[j - 1]
        fires = deep_tick_fires(state, controls, emissions.rows, j, room_B)
        asking_B &= fires

    begin_B = state.done[j]
    widths = _widths(segment, state, window)
    written, output = _tick_if_due(segment, state, target_B, fires, widths)
    state = _with_segment_state(segment, state, written)
    target_B = jnp.where(fires, target_B, begin_B)
    if state.lookup is not None and len(segments(segment.config)) > 1:
        passes = exit_balance.tick_cost(controls, j, jnp.max(target_B - begin_B))
        state = exit_balance.spend(state, passes * fires)
    state = dataclasses.replace(
        state, done=state.done.at[j].set(target_B), ticks=state.ticks.at[j].add(fires)
    )

    if output.deep is not None:
        drawn_BW = deep_tokens(output.deep)
        if state.logprobs is not None:
            state = logprobs.verified(state, controls, deep_logprobs(output.deep), begin_B, target_B)
        state, rejected_B = verify(state, controls, drawn_BW, begin_B, target_B, fires)
        # The deep tick may have reached the position at which an exit was confident in this very iteration.
        # That row then emits the full model's token instead of a draft.
        asking_B |= emissions.rows & controls.lossless & (target_B == state.length)
        # Where a draft was wrong, `verify` has already put the right token in its place.
        asking_B &= ~rejected_B
        emissions = dataclasses.replace(emissions, rows=emissions.rows & ~rejected_B)

    elif state.lookup is not None and segment.is_last:
        # A pass of full depth between two searches; there is nothing to compare with what it draws.
        ran_B = target_B > begin_B
        state = dataclasses.replace(state, verifications=state.verifications + ran_B)

    if state.lookup is not None and not segment.is_last:
        # A row that has copied tokens goes to the full model, and asks no exit for more of them.
        direct_B = lookup.has_copied(state, controls) | exit_balance.exits_rest(state)
        room_B = jnp.where(direct_B, 0, room_B)
        looking = jnp.any(looks(segment, state, asking_B=asking_B, room_B=room_B))
        state = exit_balance.spend(state, controls.look_cost * looking)
    emitted_before_B = emissions.rows
    emissions = check_exit(segment, state, emissions, output, asking_B=asking_B, room_B=room_B)
    wait = jnp.where(asking_B, jnp.where(emissions.rows, FREE, j), state.wait)
    state = dataclasses.replace(state, wait=wait)

    if segment.mode == "propagate" and not segment.is_last:
        state = propagate(segment, state, emissions.rows & ~emitted_before_B)
    return state, emissions


def can_advance(state: DecodeState, room_B: jax.Array) -> jax.Array:
    """Rows whose newest token can enter segment 0: they wait for nothing and have room for it.

    Args:
      state: between two ticks.
      room_B: int32 positions that each row may have pending, from `lossless.drafting_room`.

    Returns:
      [B] bool.
    """
    fresh = state.done[0] == state.length - 1
    room = state.done[0] - state.done[-1] < room_B
    # Without exits nothing stays pending, and there is always room.
    return state.alive & ~state.ended & (state.wait == FREE) & fresh & (room | (state.done.shape[0] == 1))


def deep_tick_fires(
    state: DecodeState, controls: Controls, emitting_B: jax.Array, j: int, room_B: jax.Array
) -> jax.Array:
    """Whether segment `j` runs now.

    It does when a row's window is full, when enough rows wait for it, or when rows wait and no row can go
    on without it. A row that has ended waits for the verification of its last tokens.

    Args:
      state: between two ticks.
      controls: its `fire_share` is read.
      emitting_B: bool, rows that emit in this iteration and therefore go on in the next.
      j: index of the segment, static, at least 1.
      room_B: int32 positions that each row may have pending.

    Returns:
      [] bool.
    """
    pending = state.done[j - 1] > state.done[j]
    full = state.alive & (state.done[0] - state.done[-1] >= room_B) & pending
    waiting = state.alive & ((state.wait == j - 1) | (state.ended & pending))

    share = controls.fire_share * jnp.sum(state.alive)
    enough = jnp.sum(waiting) >= jnp.maximum(share, 1.0)
    stuck = jnp.any(waiting) & ~jnp.any(can_advance(state, room_B) | emitting_B)
    return jnp.any(full) | enough | stuck


def tick_widths(window: int) -> tuple[int, ...]:
    """Widths for which a deep tick is compiled: a few positions, and the whole window.

    Most deep ticks find one to three positions pending, and on CPU further positions are not free: each of
    the next few costs a quarter to two thirds of the first one, and a whole window of 16 four times as much
    (`nn.linear`). Every width compiles the deeper layers once more, so there are few of them.
    """
    return (*(width for width in (1, 2, 3, 4, 8) if width < window), window)


def _widths(segment: Segment, state: DecodeState, window: int) -> tuple[int, ...]:
    """Widths for which the tick of a segment is compiled."""
    if segment.index == 0:
        if state.drafting is not None:
            return drafting.tick_widths(window)
        # One new token at a time, unless rows copy tokens from their own text.
        if state.lookup is None or segment.mode != "verify":
            return (1,)

        # Without exits, an iteration that verifies has drafts in it.
        return lookup.tick_widths(window)[1 if segment.is_last else 0 :]
    return (1,) if segment.mode == "propagate" else tick_widths(window)


def _tick_if_due(
    segment: Segment,
    state: DecodeState,
    target_B: jax.Array,
    fires: jax.Array,
    widths: tuple[int, ...],
) -> tuple[SegmentState, TickOutput]:
    """Runs the tick of the smallest width that takes all pending positions, or no tick."""
    before = _segment_state(segment, state)
    nothing = _no_output(segment, state)

    def tick(before: SegmentState, width: int) -> tuple[SegmentState, TickOutput]:
        return _tick(segment, state, before, target_B, width)

    def narrowest() -> tuple[SegmentState, TickOutput]:
        if len(widths) == 1:
            return tick(before, widths[0])

        pending = jnp.max(target_B - state.done[segment.index])
        choice = jnp.sum(jnp.asarray(widths) < pending)

        # One `cond` after the other and not a `switch`: XLA copies a cache that several branches write.
        result = before, nothing
        for i, width in enumerate(widths):
            result = jax.lax.cond(
                choice == i,
                lambda before, _, width=width: tick(before, width),
                lambda before, output: (before, output),
                *result,
            )
        return result

    return jax.lax.cond(fires, narrowest, lambda: (before, nothing))


def _tick(
    segment: Segment, state: DecodeState, before: SegmentState, target_B: jax.Array, width: int
) -> tuple[SegmentState, TickOutput]:
    """Runs a segment over positions done[j] .. done[j] + width - 1 of every row.

    The window starts at `done`, so writes to the caches need no masks: positions at or above `target_B` are
    not pending, and what the tick computes for them lands in stale entries, which are overwritten before
    they count.

    Returns:
      (the written parts of the state, what was computed at each row's newest position).
    """
    decoder, controls, j = segment.decoder, segment.controls, segment.index
    done_B = state.done[j]
    positions = done_B[:, None] + jnp.arange(width, dtype=jnp.int32)

    # The lowest segment starts from tokens, the others from the states that left the segment below.
    if j == 0:
        tokens = jnp.take_along_axis(state.tokens, positions, axis=1)
        hidden = decoder.embed(tokens, positions)
    else:
        below = state.hidden[j - 1]
        hidden = jnp.take_along_axis(below, (positions % below.shape[1])[..., None], axis=1)

    past = [cache.past(layer, done_B) for layer in before.caches]
    tap, new_kv = decoder.run_layers(hidden, positions, segment.start, segment.stop, past=past)
    caches = cache.write_all(before.caches, new_kv, tap.hidden, done_B)
    newest_B = jnp.clip(target_B - 1 - done_B, 0, width - 1)

    def newest(x_BTD: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BTD, newest_B[:, None, None], axis=1) if width > 1 else x_BTD

    if segment.is_last:
        if segment.mode != "verify":
            output = TickOutput(decoder.final_features(newest(tap.hidden)))
        else:
            deep = look_deep(
                decoder,
                decoder.final_features(tap.hidden),
                positions,
                newest_B=newest_B,
                tokens_BS=state.tokens,
                sampling=controls.sampling,
                window=_window(state),
                top=logprobs.likeliest(state),
            )
            output = TickOutput(deep=deep)
        return SegmentState(caches, None, None), output

    exit_cache = before.exit_cache
    exit_past = None if exit_cache is None else cache.past(exit_cache, done_B)
    exit_hidden, exit_kv = decoder.exit_state(j, tap, positions, past=exit_past)
    if exit_cache is not None and exit_kv is not None:
        exit_cache = cache.write(exit_cache, exit_kv, cache.after(exit_hidden, done_B))

    assert before.ring is not None
    ring = ring_write(before.ring, tap.hidden, done_B, target_B - done_B)

    features = decoder.exit_head_input(j, newest(exit_hidden), jax.tree.map(newest, tap))
    confidence_B = jax.lax.cond(
        reads_states(controls.metric),
        lambda: state_confidence(controls.metric, newest(tap.hidden), newest(tap.entering))[:, 0],
        lambda: jnp.zeros(newest_B.shape, jnp.float32),
    )
    return SegmentState(caches, exit_cache, ring), TickOutput(features, confidence_B)


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


def _no_output(segment: Segment, state: DecodeState) -> TickOutput:
    """Zeros of the shapes that a tick gives, for an iteration in which none runs."""
    config, b = segment.config, state.length.shape[0]
    if not segment.is_last:
        return TickOutput(jnp.zeros((b, 1, config.d_model), config.dtype), jnp.zeros((b,), jnp.float32))
    if segment.mode == "verify":
        top = logprobs.likeliest(state)
        more = () if top is None else (2 + 2 * top,)
        return TickOutput(deep=jnp.zeros((b, _window(state) + 1, *more), jnp.int32))
    return TickOutput(jnp.zeros((b, 1, config.d_model), config.dtype))


def _window(state: DecodeState) -> int:
    """W, the positions that may be pending; 1 where nothing drafts, so that none stay pending."""
    if state.lookup is not None:
        return state.lookup.proposal.shape[1] + 1
    if state.drafting is not None:
        return state.drafting.confidence.shape[1] + 1
    return state.hidden[0].shape[1] if state.hidden else 1


def _segment_state(segment: Segment, state: DecodeState) -> SegmentState:
    """The parts of the state that a segment writes."""
    caches = state.cache[segment.start : segment.stop]
    if segment.is_last:
        return SegmentState(caches, None, None)
    return SegmentState(caches, state.exit_cache[segment.index], state.hidden[segment.index])


def _with_segment_state(segment: Segment, state: DecodeState, written: SegmentState) -> DecodeState:
    """The state with the parts that a segment has written."""
    j, start, stop = segment.index, segment.start, segment.stop
    caches = (*state.cache[:start], *written.caches, *state.cache[stop:])
    if written.ring is None:
        return dataclasses.replace(state, cache=caches)
    return dataclasses.replace(
        state,
        cache=caches,
        exit_cache=(*state.exit_cache[:j], written.exit_cache, *state.exit_cache[j + 1 :]),
        hidden=(*state.hidden[:j], written.ring, *state.hidden[j + 1 :]),
    )

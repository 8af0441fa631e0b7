"""Prompt lookup: drafts of lossless rows that the row's own text suggests, without a model.

Let x_0 .. x_{L-1} be the tokens of a row, its prompt and what was emitted. For every earlier position p the
match m(p) is the number of tokens before p that equal the newest ones,

    m(p) = max { n <= N : x_{p-i} = x_{L-i} for i = 1 .. n },      1 <= p < L,

and the row proposes what followed the latest of the longest matches: x_p, x_{p+1}, ... Where the proposal
reaches the row's end it goes on with itself, so that a text that repeats every few tokens is continued.

How many of the proposed tokens are drafted follows acceptance and cost. With a_n the share of accepted tokens
after a match of n, which each row counts for itself (old counts fade), and c(T) the time of one iteration
over T positions, measured on the device (`tick_costs`), all rows of a batch draft the k that maximises

    sum_rows ( 1 + sum_{i=1..k} prod_{t<i} a_{min(n+t, N)} ) / c(1 + k)

tokens per second, where k = 0 is full depth, or the exits where these are faster (`exit_balance`). Proposals
that are not drafted are compared with the text as well, once it is known: a row whose text begins to repeat
itself is noticed while it drafts nothing.

A search after which no row drafts is followed by a rest: iterations at full depth, or with exits, without
one. Rests grow from one such search to the next, up to the length that `tick_costs` gives, which keeps most
searches in vain to a hundredth of the time. The first draft ends them.

The drafts are verified as those of exits are (`lossless`), so that nothing but speed depends on them.

Paper: Inference with reference, arXiv 2304.04487. Known as prompt lookup decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastic_lm.decode.exit_balance import even_balance, exits_rest
from elastic_lm.decode.state import COPIED, FREE, Controls, DecodeState, Lookup

LONGEST_MATCH = 8  # N, longest match that is told from longer ones
FADE = 0.95  # of the counts of acceptance, per counted token
# Acceptance that a row starts with, a_1 .. a_N, and how many tokens this belief weighs.
PRIOR = (0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
PRIOR_WEIGHT = 8.0
TINY = 1e-6  # keeps exits whose cost is not measured, and so is 0, from a division by it


def no_proposals(batch: int, window: int) -> Lookup:
    """The lookup of rows that have proposed nothing, for windows of W positions (static)."""
    prior = jnp.broadcast_to(PRIOR_WEIGHT * jnp.asarray(PRIOR, jnp.float32), (batch, LONGEST_MATCH))
    return Lookup(
        proposal=jnp.full((batch, window - 1), -1, jnp.int32),
        proposed_at=jnp.zeros((batch,), jnp.int32),
        match=jnp.zeros((batch,), jnp.int32),
        hits=prior,
        trials=jnp.full((batch, LONGEST_MATCH), PRIOR_WEIGHT, jnp.float32),
        asked_at=jnp.zeros((batch,), jnp.int32),
        rest=jnp.int32(0),
        next_rest=jnp.int32(0),
        exits=even_balance(),
    )


def tick_widths(window: int) -> tuple[int, ...]:
    """Widths for which the lowest segment is compiled: every one compiles all layers below the first exit."""
    return (*(width for width in (1, 4, 8) if width < window), window)


def propose(tokens_BS: jax.Array, length_B: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """What followed the latest of the longest earlier matches of each row's newest tokens.

    Args:
      tokens_BS: int32 tokens of the rows.
      length_B: int32 tokens known, at least 1.
      count: tokens to propose, static.

    Returns:
      (proposal [B, count] int32, of no meaning where nothing matches; match [B] int32 tokens that match,
      0 .. N).
    """
    capacity = tokens_BS.shape[1]
    position = jnp.arange(capacity)
    back = jnp.arange(1, LONGEST_MATCH + 1)
    newest_BN = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B[:, None] - back, 0), axis=1)

    # What lies before the row's first token equals nothing. Slices of one padded array, and not one shifted
    # array after the other, become one loop over the text together with the maximum below.
    padded = jnp.pad(tokens_BS, [(0, 0), (LONGEST_MATCH, 0)], constant_values=-1)
    match_BS = jnp.zeros(tokens_BS.shape, jnp.int32)
    for i in range(LONGEST_MATCH, 0, -1):
        before_BS = padded[:, LONGEST_MATCH - i : LONGEST_MATCH - i + capacity]  # x_{p-i}
        match_BS = jnp.where(before_BS == newest_BN[:, i - 1 : i], match_BS + 1, 0)

    # The longest match, and among equally long ones the latest.
    match_BS = jnp.where(position < length_B[:, None], match_BS, 0)
    best_B = jnp.max(match_BS * capacity + position, axis=1)
    match_B, start_B1 = best_B // capacity, (best_B % capacity)[:, None]

    # Beyond the row's end the proposal goes on with itself.
    period_B1 = jnp.maximum(length_B[:, None] - start_B1, 1)
    return jnp.take_along_axis(tokens_BS, start_B1 + jnp.arange(count) % period_B1, axis=1), match_B


def learn(lookup: Lookup, tokens_BS: jax.Array, length_B: jax.Array, rows_B: jax.Array) -> Lookup:
    """Counts which of the last proposals came true.

    Args:
      lookup: with proposals for the positions from `proposed_at` on.
      tokens_BS: int32 tokens of the rows.
      length_B: int32 tokens known.
      rows_B: bool, rows that are counted.

    Returns:
      The lookup with new counts.
    """
    count = lookup.proposal.shape[1]
    index = jnp.arange(count)
    position = lookup.proposed_at[:, None] + index
    known = (position < length_B[:, None]) & (lookup.match > 0)[:, None] & rows_B[:, None]
    came = jnp.take_along_axis(tokens_BS, jnp.minimum(position, tokens_BS.shape[1] - 1), axis=1)

    # The tokens up to the first that differs, and that one, were tried; nothing can be said of the others.
    right = known & (came == lookup.proposal)
    first = _first(~right)[:, None]
    tried, run = known & (index <= first), index < first

    after = _matches(lookup.match, count)[..., None] == jnp.arange(1, LONGEST_MATCH + 1)  # [B, count, N]
    trials = jnp.sum(tried[..., None] & after, axis=1).astype(jnp.float32)
    hits = jnp.sum(run[..., None] & after, axis=1).astype(jnp.float32)
    fade = FADE**trials
    return dataclasses.replace(lookup, hits=lookup.hits * fade + hits, trials=lookup.trials * fade + trials)


def expected_tokens(lookup: Lookup, match_B: jax.Array, count: int) -> jax.Array:
    """[B, count + 1] float32: tokens that an iteration is expected to give with 0 .. count drafts."""
    rate = lookup.hits / jnp.maximum(lookup.trials, 1e-6)
    each = jnp.take_along_axis(rate, _matches(match_B, count) - 1, axis=1)
    each = jnp.where((match_B > 0)[:, None], each, 0.0)

    # Products and sums of prefixes by definition: `cumprod` becomes many small kernels.
    index = jnp.arange(count + 1)
    right = jnp.prod(jnp.where(index[:count] <= index[:count, None], each[:, None], 1.0), axis=2)
    return 1.0 + jnp.sum(jnp.where(index[:count] < index[:, None], right[:, None], 0.0), axis=2)


def _matches(match_B: jax.Array, count: int) -> jax.Array:
    """[B, count] int32 in 1 .. N: the match before each proposed token, if those before it are right."""
    return jnp.clip(match_B[:, None] + jnp.arange(count), 1, LONGEST_MATCH)


def _first(flag_BT: jax.Array) -> jax.Array:
    """[B] int32: index of the first column that is true, T where none is."""
    count = flag_BT.shape[1]
    return jnp.min(jnp.where(flag_BT, jnp.arange(count), count), axis=1)


def draft(state: DecodeState, controls: Controls, asking_B: jax.Array) -> DecodeState:
    """Appends drafts to the rows that ask for a token, if a search is due.

    Args:
      state: between two iterations, with a `lookup`.
      controls: traced; `lossless`, `adapt`, `stop_tokens`, `measuring`, `tick_costs` and `longest_rest` are
        read.
      asking_B: bool, rows whose newest token is about to enter the lowest segment.

    Returns:
      The state, in which drafts count as tokens.
    """
    assert state.lookup is not None
    rows_B = asking_B & controls.lossless
    asks = jnp.any(rows_B)
    asked_at = jnp.where(rows_B, state.length, state.lookup.asked_at)
    before = dataclasses.replace(state.lookup, asked_at=asked_at)

    def search() -> tuple[Lookup, jax.Array]:
        return _search(state, before, controls, rows_B)

    def rest() -> tuple[Lookup, jax.Array]:
        rested = dataclasses.replace(before, rest=jnp.maximum(before.rest - asks, 0))
        return rested, jnp.zeros_like(state.length)

    due = asks & (before.rest == 0)
    lookup, drafts_B = jax.lax.cond(due, search, rest)

    def copy() -> tuple[jax.Array, jax.Array]:
        row = jnp.arange(rows_B.shape[0])[:, None]
        index = jnp.arange(lookup.proposal.shape[1])
        # What is not drafted is written out of bounds, which JAX drops.
        position = jnp.where(index < drafts_B[:, None], state.length[:, None] + index, state.tokens.shape[1])
        return (
            state.tokens.at[row, position].set(lookup.proposal, mode="drop"),
            state.exit_layers.at[row, position].set(COPIED, mode="drop"),
        )

    kept = state.tokens, state.exit_layers
    tokens, exit_layers = jax.lax.cond(jnp.any(drafts_B > 0), copy, lambda: kept)
    return dataclasses.replace(
        state,
        tokens=tokens,
        exit_layers=exit_layers,
        length=state.length + drafts_B,
        wait=jnp.where(drafts_B > 0, FREE, state.wait),
        lookup=lookup,
    )


def _search(
    state: DecodeState, lookup: Lookup, controls: Controls, rows_B: jax.Array
) -> tuple[Lookup, jax.Array]:
    """New proposals for some rows, and how many tokens of them each row drafts, [B] int32."""
    count = lookup.proposal.shape[1]
    lookup = learn(lookup, state.tokens, state.length, rows_B)
    proposal, match_B = propose(state.tokens, state.length, count)

    # A row drafts no token that would end it, and leaves the last one to the full model. Positions that exits
    # have left pending take room in the window.
    index = jnp.arange(count)
    stops = jnp.any(proposal[..., None] == controls.stop_tokens, axis=-1)
    usable = ((match_B > 0) | controls.measuring)[:, None] & ~stops & rows_B[:, None]
    usable &= state.length[:, None] + index < state.limit[:, None] - 1
    usable &= index < count - (state.done[0] - state.done[-1])[:, None]
    room_B = _first(~usable)

    # One tick processes all rows, so that all pay for the longest draft.
    expected = expected_tokens(lookup, match_B, count)
    within = jnp.minimum(jnp.arange(count + 1), room_B[:, None])
    tokens_per_time = jnp.sum(jnp.take_along_axis(expected, within, axis=1) * rows_B[:, None], axis=0)
    tokens_per_time /= controls.tick_costs[: count + 1]
    # What is compared with them is not full depth where exits are faster.
    exits = jnp.where(exits_rest(state), 1.0, lookup.exits.gained / jnp.maximum(lookup.exits.spent, TINY))
    tokens_per_time *= jnp.where(jnp.arange(count + 1) == 0, jnp.maximum(exits, 1.0), 1.0)
    best = jnp.argmax(tokens_per_time)
    drafts_B = jnp.minimum(jnp.where(controls.adapt, best, state.draft), room_B)

    # Every search that brings nothing is followed by a longer rest than the one before.
    nothing = jnp.all(drafts_B == 0)
    longer = jnp.minimum(2 * lookup.next_rest + 1, controls.longest_rest)
    lookup = dataclasses.replace(
        lookup,
        proposal=jnp.where(rows_B[:, None], proposal, lookup.proposal),
        proposed_at=jnp.where(rows_B, state.length, lookup.proposed_at),
        match=jnp.where(rows_B, match_B, lookup.match),
        rest=jnp.where(nothing, lookup.next_rest, 0),
        next_rest=jnp.where(nothing, longer, 0),
    )
    return lookup, drafts_B


def has_copied(state: DecodeState, controls: Controls) -> jax.Array:
    """[B] bool: of the rows that wait for a token, the lossless ones whose newest tokens are copied."""
    assert state.lookup is not None
    # A row that waits has emitted nothing since it asked, so that only copies make it longer.
    return controls.lossless & (state.length > state.lookup.asked_at)

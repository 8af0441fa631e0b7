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

tokens per second, where k = 0 is full depth. Proposals that are not drafted are compared with the text as
well, once it is known: a row whose text begins to repeat itself is noticed while it drafts nothing.

The drafts are verified as those of exits are (`lossless`), so that nothing but speed depends on them.

Paper: Inference with reference, arXiv 2304.04487. Known as prompt lookup decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastic_lm.decode.state import COPIED, FREE, Controls, DecodeState, Lookup

LONGEST_MATCH = 8  # N, longest match that is told from longer ones
FADE = 0.95  # of the counts of acceptance, per counted token
# Acceptance that a row starts with, a_1 .. a_N, and how many tokens this belief weighs.
PRIOR = (0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
PRIOR_WEIGHT = 4.0


def no_proposals(batch: int, window: int) -> Lookup:
    """The lookup of rows that have proposed nothing, for windows of W positions (static)."""
    prior = jnp.broadcast_to(PRIOR_WEIGHT * jnp.asarray(PRIOR, jnp.float32), (batch, LONGEST_MATCH))
    return Lookup(
        proposal=jnp.full((batch, window - 1), -1, jnp.int32),
        proposed_at=jnp.zeros((batch,), jnp.int32),
        match=jnp.zeros((batch,), jnp.int32),
        hits=prior,
        trials=jnp.full((batch, LONGEST_MATCH), PRIOR_WEIGHT, jnp.float32),
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
      (proposal [B, count] int32, -1 where there is no match; match [B] int32 tokens that match, 0 .. N).
    """
    capacity = tokens_BS.shape[1]
    position = jnp.arange(capacity)
    match_BS = jnp.zeros(tokens_BS.shape, jnp.int32)
    matches_BS = (position >= 1) & (position < length_B[:, None])
    before_BS = tokens_BS
    for i in range(1, LONGEST_MATCH + 1):
        before_BS = jnp.roll(before_BS, 1, axis=1)  # x_{p-i}; what rolls in from the end is ruled out next
        newest_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B - i, 0)[:, None], axis=1)
        matches_BS &= (before_BS == newest_B1) & (position >= i)
        match_BS += matches_BS

    # The longest match, and among equally long ones the latest.
    start_B1 = jnp.argmax(match_BS * capacity + position, axis=1)[:, None]
    match_B = jnp.take_along_axis(match_BS, start_B1, axis=1)[:, 0]

    # Beyond the row's end the proposal goes on with itself.
    period_B1 = jnp.maximum(length_B[:, None] - start_B1, 1)
    proposal = jnp.take_along_axis(tokens_BS, start_B1 + jnp.arange(count) % period_B1, axis=1)
    return jnp.where(match_B[:, None] > 0, proposal, -1), match_B


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
    run = jnp.cumprod(right, axis=1).astype(bool)
    tried = known & jnp.pad(run, [(0, 0), (1, 0)], constant_values=True)[:, :-1]

    after = jax.nn.one_hot(_matches(lookup.match, count) - 1, LONGEST_MATCH)  # [B, count, N]
    trials = jnp.einsum("bk,bkn->bn", tried.astype(jnp.float32), after)
    hits = jnp.einsum("bk,bkn->bn", run.astype(jnp.float32), after)
    fade = FADE**trials
    return dataclasses.replace(lookup, hits=lookup.hits * fade + hits, trials=lookup.trials * fade + trials)


def expected_tokens(lookup: Lookup, match_B: jax.Array, count: int) -> jax.Array:
    """[B, count + 1] float32: tokens that an iteration is expected to give with 0 .. count drafts."""
    rate = lookup.hits / jnp.maximum(lookup.trials, 1e-6)
    each = jnp.take_along_axis(rate, _matches(match_B, count) - 1, axis=1)
    more = jnp.cumsum(jnp.cumprod(jnp.where((match_B > 0)[:, None], each, 0.0), axis=1), axis=1)
    return 1.0 + jnp.pad(more, [(0, 0), (1, 0)])


def _matches(match_B: jax.Array, count: int) -> jax.Array:
    """[B, count] int32 in 1 .. N: the match before each proposed token, if those before it are right."""
    return jnp.clip(match_B[:, None] + jnp.arange(count), 1, LONGEST_MATCH)


def draft(state: DecodeState, controls: Controls, asking_B: jax.Array) -> DecodeState:
    """Appends drafts to the rows that ask for a token.

    Args:
      state: between two iterations, with a `lookup`.
      controls: traced; `lossless`, `draft` and `tick_costs` are read.
      asking_B: bool, rows whose newest token is about to enter the lowest segment.

    Returns:
      The state, in which drafts count as tokens.
    """
    lookup = state.lookup
    assert lookup is not None
    count = lookup.proposal.shape[1]
    rows_B = asking_B & controls.lossless

    lookup = learn(lookup, state.tokens, state.length, rows_B)
    proposal, match_B = propose(state.tokens, state.length, count)

    # A row drafts no token that would end it, and leaves the last one to the full model.
    index = jnp.arange(count)
    stops = jnp.any(proposal[..., None] == controls.stop_tokens, axis=-1)
    usable = (proposal >= 0) & (state.length[:, None] + index < state.limit[:, None] - 1) & rows_B[:, None]
    usable &= jnp.cumsum(stops, axis=1) == 0
    # Positions that exits have left pending take room in the window.
    usable &= index < count - (state.done[0] - state.done[-1])[:, None]
    room_B = jnp.sum(usable, axis=1)

    # One tick processes all rows, so that all pay for the longest draft.
    expected = expected_tokens(lookup, match_B, count)
    within = jnp.minimum(jnp.arange(count + 1), room_B[:, None])
    tokens_per_time = jnp.sum(jnp.take_along_axis(expected, within, axis=1) * rows_B[:, None], axis=0)
    best = jnp.argmax(tokens_per_time / controls.tick_costs[: count + 1])
    drafts_B = jnp.minimum(jnp.where(controls.adapt, best, state.draft), room_B)

    row = jnp.arange(rows_B.shape[0])[:, None]
    # What is not drafted is written out of bounds, which JAX drops.
    position = jnp.where(index < drafts_B[:, None], state.length[:, None] + index, state.tokens.shape[1])
    lookup = dataclasses.replace(
        lookup,
        proposal=jnp.where(rows_B[:, None], proposal, lookup.proposal),
        proposed_at=jnp.where(rows_B, state.length, lookup.proposed_at),
        match=jnp.where(rows_B, match_B, lookup.match),
    )
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[row, position].set(proposal, mode="drop"),
        exit_layers=state.exit_layers.at[row, position].set(COPIED, mode="drop"),
        length=state.length + drafts_B,
        wait=jnp.where(drafts_B > 0, FREE, state.wait),
        lookup=lookup,
    )


def has_copied(state: DecodeState, controls: Controls) -> jax.Array:
    """[B] bool: of the rows that wait for a token, the lossless ones whose newest tokens are copied."""
    assert state.lookup is not None
    # A row that waits has emitted nothing since it was looked up, so that only copies make it longer.
    return controls.lossless & (state.length > state.lookup.proposed_at)

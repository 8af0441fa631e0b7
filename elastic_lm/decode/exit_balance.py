"""Whether the exits of lossless rows pay where these rows can copy from their own text as well.

Looking at an exit reads a vocabulary head, and a rejected draft was computed for nothing. Let c(T) be the
time of an iteration over T positions at full depth, s_j the share of it that segment j takes, and h what a
look at an exit costs. `tick_costs` measures c, the mean of h over the exits, and the share of the lowest
segment over one position; the segments above are taken to share the rest by their layers, over any number of
positions. The iterations without copied tokens have

    spent  = sum ( sum_{j fired} s_j c(T_j) + h looks ) / c(1),      gained = sum of new tokens per row,

where a token that is taken back counts as -1, and both sums fade. At full depth both would be equal. While
gained falls short of spent, exits rest: their rows go to the full model, or copy. After a while they are
tried again, with twice as long a rest if they fall short once more.

Where the length of drafts is given, nothing is measured, and exits never rest. Drafts of exits that are taken
back beside copied tokens are not counted. Nothing but speed depends on all this, because the rows are
verified.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastic_lm.decode.state import Controls, DecodeState, ExitBalance

FADE = 0.9  # of both sums, per iteration in which the last segment ran
BELIEF = 12.0  # passes that the first belief, that exits are worth their cost, weighs
AGAIN = 4.0  # the same after a rest
SHORT = 0.95  # of what was spent, below which exits rest
FIRST_REST, LONGEST_REST = 32, 1024  # iterations


def even_balance() -> ExitBalance:
    """The balance of exits that are believed to be just worth their cost."""
    return ExitBalance(
        spent=jnp.float32(BELIEF),
        gained=jnp.float32(BELIEF),
        rest=jnp.int32(0),
        next_rest=jnp.int32(FIRST_REST),
    )


def tick_cost(controls: Controls, j: int, positions: jax.Array) -> jax.Array:
    """[] float32: the time of segment `j` over this many positions per row, in passes at full depth."""
    costs = controls.tick_costs
    return controls.segment_shares[j] * costs[jnp.clip(positions, 1, costs.shape[0]) - 1] / costs[0]


def spend(state: DecodeState, passes: jax.Array) -> DecodeState:
    """The state with more spent, in passes at full depth."""
    return _with_balance(state, spent=_balance(state).spent + passes)


def settle(state: DecodeState, before: DecodeState, asking_B: jax.Array, copied: jax.Array) -> DecodeState:
    """Closes an iteration: adds what it gained, and lets exits rest if it was too little.

    Args:
      state: after the iteration, with what it has spent.
      before: the state before it.
      asking_B: bool, rows whose newest token entered the lowest segment.
      copied: bool, whether any row had copied tokens in it; then exits have no part in it.

    Returns:
      The state with another balance.
    """
    old, new = _balance(before), _balance(state)
    alive = jnp.maximum(jnp.sum(before.alive), 1)
    gained = new.gained + jnp.sum(state.length - before.length) / alive

    # Drafts are right or wrong only once the last segment has run.
    verified = state.ticks[-1] > before.ticks[-1]
    fade = jnp.where(verified, FADE, 1.0)
    resting = old.rest > 0
    short = verified & (gained < SHORT * new.spent) & ~resting

    counted = ~copied & ~resting
    begins = counted & short
    return _with_balance(
        state,
        spent=jnp.where(begins, AGAIN, jnp.where(counted, fade * new.spent, old.spent)),
        gained=jnp.where(begins, AGAIN, jnp.where(counted, fade * gained, old.gained)),
        rest=jnp.where(begins, old.next_rest, jnp.maximum(old.rest - jnp.any(asking_B), 0)),
        next_rest=jnp.where(begins, jnp.minimum(2 * old.next_rest, LONGEST_REST), old.next_rest),
    )


def exits_rest(state: DecodeState) -> jax.Array:
    """[] bool: whether no exit is looked at for now."""
    return _balance(state).rest > 0


def _balance(state: DecodeState) -> ExitBalance:
    assert state.lookup is not None
    return state.lookup.exits


def _with_balance(state: DecodeState, **fields: jax.Array) -> DecodeState:
    assert state.lookup is not None
    balance = dataclasses.replace(state.lookup.exits, **fields)
    return dataclasses.replace(state, lookup=dataclasses.replace(state.lookup, exits=balance))

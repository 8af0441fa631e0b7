"""State of the decode loop: everything that stays on the device between ticks."""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.decode.cache import LayerCache
from elastic_lm.decode.sampling import BROKEN, Sampling

Mode = Literal["exact", "verify", "propagate"]  # what becomes of the deeper layers of early tokens

FREE = -1  # `wait` of a row that waits for no deeper segment
UNDRAWN = -1  # token of a row that emits, but whose logits have not been drawn from
COPIED = 0  # layers that ran before a token was chosen that was copied from the row's own text


@flax.struct.dataclass
class Controls:
    """What a caller may change between calls without recompilation; every field is traced.

    Attributes:
      thresholds: [B, J, S] float32; with its newest token at position p, row b leaves at exit j when its
        confidence >= thresholds[b, j, p]. 0 = always, above 1 = never (the exit's head is then not read).
      gates: [B, J] float32; the head of exit j is read only where its gate gives at least this.
      metric: int32 index into `depth.confidence.METRICS`.
      fire_share: float32 in [0, 1]; a deep tick fires when this share of the living rows waits for it, and at
        least one row does. 0 = as soon as any row waits (latency), 1 = when all do (throughput).
      together: bool; rows leave early only if all rows that ask are confident (CALM's rule for batches).
      lossless: [B] bool; the row's early tokens are drafts, which the full model verifies.
      adapt: bool; the length of drafts follows how many are accepted.
      stop_tokens: [E] int32 tokens that end a row; -1 = unused.
      tick_costs: [W] float32, time of an iteration over 1 .. W positions per row, in any unit; decides how
        many tokens `lookup` drafts.
      longest_rest: int32, most iterations that `lookup` lets pass after a search that brought nothing.
      measuring: bool; `lookup` drafts something even where nothing matches, so that iterations can be timed.
      segment_shares: [J + 1] float32, shares of the segments in the time of an iteration over one position.
      look_cost: float32, time of a look at an exit, as a share of the same.
      sampling: how tokens are drawn.
    """

    thresholds: jax.Array
    gates: jax.Array
    metric: jax.Array
    fire_share: jax.Array
    together: jax.Array
    lossless: jax.Array
    adapt: jax.Array
    stop_tokens: jax.Array
    tick_costs: jax.Array
    longest_rest: jax.Array
    measuring: jax.Array
    segment_shares: jax.Array
    look_cost: jax.Array
    sampling: Sampling


@flax.struct.dataclass
class ExitBalance:
    """What the exits of lossless rows cost and brought (`decode.exit_balance`), for all rows together.

    Attributes:
      spent: float32, faded time of iterations without copied tokens, in passes at full depth.
      gained: float32, faded tokens per row that they gave.
      rest: int32, iterations that are left in which no exit is looked at.
      next_rest: int32, iterations of the rest that follows if exits fall short again.
    """

    spent: jax.Array
    gained: jax.Array
    rest: jax.Array
    next_rest: jax.Array


@flax.struct.dataclass
class Lookup:
    """What rows propose from their own text (`decode.lookup`), and how often they were right.

    Attributes:
      proposal: [B, W - 1] int32, proposed tokens; of no meaning where nothing matched.
      proposed_at: [B] int32, position of the first of them.
      match: [B] int32, tokens that matched when they were proposed, 0 .. N; 0 = nothing.
      hits: [B, N] float32, faded count of proposed tokens that came true, by the match before them.
      trials: [B, N] float32, faded count of proposed tokens that were compared with the text.
      asked_at: [B] int32, length of the row when its newest token was about to enter the lowest segment.
      rest: int32, iterations that are left before the next search.
      next_rest: int32, iterations that follow the next search if it brings nothing.
      exits: whether exits pay beside it.
    """

    proposal: jax.Array
    proposed_at: jax.Array
    match: jax.Array
    hits: jax.Array
    trials: jax.Array
    asked_at: jax.Array
    rest: jax.Array
    next_rest: jax.Array
    exits: ExitBalance


@flax.struct.dataclass
class Drafting:
    """What is known of the drafts of a sub-network (`decode.drafting`), for all rows together.

    Attributes:
      confidence: [B, W - 1] float32, the sub-network's probability of each draft of the last round.
      hits: [N + 1] float32, faded count of drafts that were accepted, by their probability, and of all.
      trials: [N + 1] float32, faded count of drafts that were verified, likewise.
      rest: int32, rounds that are left in which nothing is drafted.
      next_rest: int32, rounds of the rest that follows if drafts do not pay again.
      probes: int32, rounds that are left in which something is drafted whatever is expected.
      ticks: int32, steps of the sub-network.
    """

    confidence: jax.Array
    hits: jax.Array
    trials: jax.Array
    rest: jax.Array
    next_rest: jax.Array
    probes: jax.Array
    ticks: jax.Array


@flax.struct.dataclass
class DecodeState:
    """Rows being decoded; J exits cut the model into J + 1 segments, W is the pending window.

    Attributes:
      tokens: [B, S] int32, prompt and emitted tokens; `sampling.BROKEN` where logits were not finite.
      exit_layers: [B, S] int32, layers that ran before each emitted token was chosen; COPIED where none did.
      length: [B] int32, tokens known.
      limit: [B] int32, length at which the row ends.
      alive: [B] bool, the row still runs.
      ended: [B] bool, the newest token ends the row; a lossless row stays alive until it is verified.
      wait: [B] int32; FREE, or j where the newest token passed exit j without being confident.
      done: [J + 1, B] int32, positions that segment j has processed; length >= done[0] >= ... >= done[J].
      hidden: J arrays [B, W, D]; the state that left segment j at position p lies in slot p % W.
      cache: one LayerCache per layer.
      exit_cache: one LayerCache per exit of kind `block`, else None.
      draft: [B] int32, tokens that a lossless row may draft before the deep layers verify them.
      drafted: [B] int32, drafted tokens that were verified.
      accepted: [B] int32, drafted tokens that the full model accepted.
      copied: [B] int32, those of the accepted tokens that were copied from the row's own text.
      verifications: [B] int32, how often the deepest segment ran over positions of the row.
      lookup: what rows propose from their own text; None where they do not.
      ticks: [J + 1] int32, how often each segment ran.
      logprobs: [B, S, C] int32, log-probabilities of emitted tokens (`decode.logprobs`); None = unasked.
      drafting: what is known of the drafts of a sub-network; None where none drafts.
    """

    tokens: jax.Array
    exit_layers: jax.Array
    length: jax.Array
    limit: jax.Array
    alive: jax.Array
    ended: jax.Array
    wait: jax.Array
    done: jax.Array
    hidden: tuple[jax.Array, ...]
    cache: tuple[LayerCache, ...]
    exit_cache: tuple[LayerCache | None, ...]
    draft: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    copied: jax.Array
    verifications: jax.Array
    lookup: Lookup | None
    ticks: jax.Array
    logprobs: jax.Array | None = None
    drafting: Drafting | None = None


@flax.struct.dataclass
class Emissions:
    """What the rows will emit at the end of an iteration; the other fields count only where `rows` is true.

    Attributes:
      rows: [B] bool, rows that will emit a token.
      logits: [B, V] float32 logits that the token is drawn from, where it is not drawn yet.
      tokens: [B] int32, the token where it is drawn already; UNDRAWN elsewhere.
      depth: [B] int32, layers that ran before the token was chosen.
    """

    rows: jax.Array
    logits: jax.Array
    tokens: jax.Array
    depth: jax.Array


def no_emissions(config: ModelConfig, state: DecodeState) -> Emissions:
    """Emissions in which no row emits, for the beginning of an iteration."""
    b = state.length.shape[0]
    logits = jnp.zeros((b, config.vocab_size), jnp.float32)
    undrawn = jnp.full((b,), UNDRAWN, jnp.int32)
    return Emissions(jnp.zeros((b,), bool), logits, undrawn, jnp.zeros((b,), jnp.int32))


def segments(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """The runs of layers between exits; an exit after the last layer cuts nothing.

    Args:
      config: static.

    Returns:
      (first layer, one past the last layer) of each of the J + 1 segments.
    """
    cuts = [e.layer for e in config.exits if e.layer < config.n_layers]
    return tuple(zip([0, *cuts], [*cuts, config.n_layers], strict=True))


def emit(
    state: DecodeState, rows_B: jax.Array, tokens_B: jax.Array, depth_B: jax.Array, stop_tokens: jax.Array
) -> DecodeState:
    """Appends a token to some rows.

    Args:
      state: between two ticks.
      rows_B: bool, rows that get a token.
      tokens_B: int32 tokens; those of the other rows are not read.
      depth_B: int32, layers that ran before each token was chosen.
      stop_tokens: [E] int32 tokens that end a row; -1 = unused.

    Returns:
      The state, in which these rows wait for nothing and are marked where the token ends them.
    """
    row = jnp.arange(rows_B.shape[0])
    # Rows that get no token write out of bounds, which JAX drops.
    position = jnp.where(rows_B, state.length, state.tokens.shape[1])
    length = state.length + rows_B
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[row, position].set(tokens_B, mode="drop"),
        exit_layers=state.exit_layers.at[row, position].set(depth_B, mode="drop"),
        length=length,
        ended=jnp.where(rows_B, ends(state, tokens_B, length, stop_tokens), state.ended),
        wait=jnp.where(rows_B, FREE, state.wait),
    )


def ends(state: DecodeState, tokens_B: jax.Array, length_B: jax.Array, stop_tokens: jax.Array) -> jax.Array:
    """Whether a newest token ends its row: a stop token, the last one asked for, or none (`BROKEN`).

    Args:
      state: its `limit` is read.
      tokens_B: int32 newest tokens.
      length_B: int32 lengths of the rows, the newest tokens included.
      stop_tokens: [E] int32; -1 = unused.

    Returns:
      [B] bool.
    """
    ended_B = jnp.any(tokens_B[:, None] == stop_tokens, axis=-1) | (tokens_B == BROKEN)
    return ended_B | (length_B >= state.limit)


def retire(state: DecodeState, lossless_B: jax.Array) -> DecodeState:
    """Ends the rows whose newest token ends them; lossless ones only once every token is verified.

    Args:
      state: after `emit`.
      lossless_B: bool, rows that are verified.

    Returns:
      The state with fewer rows alive.
    """
    # Position p verifies the token at p + 1, so the newest token itself need not have entered the last layer.
    final = ~lossless_B | (state.done[-1] >= state.length - 1)
    return dataclasses.replace(state, alive=state.alive & ~(state.ended & final))

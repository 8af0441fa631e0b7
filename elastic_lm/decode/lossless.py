"""Lossless decoding: early tokens are drafts, and the deep tick that fills their caches verifies them.

Let x_p be the token at position p, y_p the token that the full model draws for it given the tokens
before, with the same noise: a row's draws depend on its seed and the position alone (`sampling`).
The deep tick gives y at every pending position at once. Drafts are kept up to the first x_p != y_p; y_p
takes its place, and what followed is forgotten. So every row emits what the full model emits with the
same seed: greedy decoding token for token, and sampled text with exactly its distribution, because
the draws of draft and verifier are coupled by their noise (Gumbel-max) instead of an accept-reject step
that would need the drafts' distributions to be kept.

A draft ends where an exit is not confident, and after `draft` tokens; the deep tick answers there. Draft
lengths grow by one when all drafts stay and shrink to what stayed when one does not.

Papers: LayerSkip, arXiv 2404.16710; dynamic self-speculative decoding, arXiv 2407.21082.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastic_lm.decode.sampling import Sampling, sample
from elastic_lm.decode.state import FREE, Controls, DecodeState, ends
from elastic_lm.models.decoder import Decoder


def look_deep(
    decoder: Decoder,
    features_BTD: jax.Array,
    positions_BT: jax.Array,
    newest_B: jax.Array,
    tokens_BS: jax.Array,
    how: Sampling,
    window: int,
) -> jax.Array:
    """What the full model says of T <= W positions, in one array.

    One array, because XLA copies the caches of a conditional that returns more than one beside them.

    Args:
      decoder: bound to its parameters.
      features_BTD: input of the final vocabulary head.
      positions_BT: int32 positions.
      newest_B: int32 index along T of each row's newest position.
      tokens_BS: int32 tokens of the rows.
      how: the rows' sampling settings.
      window: W, static.

    Returns:
      [B, V + W] float32: logits at each row's newest position, then the token drawn after each position,
      padded to W; see `deep_logits` and `deep_tokens`. Token ids are exact up to 2^24.
    """
    b, t, _ = features_BTD.shape
    logits = decoder.final_logits(features_BTD)
    each = jax.tree.map(lambda x: jnp.repeat(x, t, axis=0), (tokens_BS, how))
    drawn = sample(logits.reshape(b * t, -1), each[0], positions_BT.reshape(-1) + 1, each[1])
    drawn = jnp.pad(drawn.reshape(b, t).astype(jnp.float32), [(0, 0), (0, window - t)])
    newest = jnp.take_along_axis(logits, newest_B[:, None, None], axis=1)[:, 0]
    return jnp.concatenate([newest, drawn], axis=1)


def deep_logits(deep: jax.Array, window: int) -> jax.Array:
    """The full model's logits at each row's newest position.

    Args:
      deep: [B, V + W] float32 from `look_deep`.
      window: W, static.

    Returns:
      [B, V] float32.
    """
    return deep[:, : deep.shape[1] - window]


def deep_tokens(deep: jax.Array, window: int) -> jax.Array:
    """The tokens that the full model draws after each position that ran.

    Args:
      deep: [B, V + W] float32 from `look_deep`.
      window: W, static.

    Returns:
      [B, W] int32; 0 behind the positions that ran.
    """
    return deep[:, deep.shape[1] - window :].astype(jnp.int32)


def drafting_room(state: DecodeState, controls: Controls, window: int) -> jax.Array:
    """Positions that a row may have pending: the window, or a lossless row's drafts and one more.

    Args:
      state: its `draft` is read.
      controls: its `lossless` is read.
      window: W, static.

    Returns:
      [B] int32, at most W.
    """
    return jnp.where(controls.lossless, jnp.minimum(state.draft + 1, window), window)


def known(state: DecodeState, controls: Controls) -> jax.Array:
    """[B] int32 tokens of each row that no verification can take back."""
    return jnp.where(controls.lossless, jnp.minimum(state.length, state.done[-1] + 1), state.length)


def verify(
    state: DecodeState, controls: Controls, drawn_BW: jax.Array, begin_B: jax.Array, target_B: jax.Array
) -> tuple[DecodeState, jax.Array]:
    """Compares the drafts of lossless rows with what the full model draws, and undoes the wrong ones.

    Args:
      state: after the deepest segment ran over positions begin .. target - 1.
      controls: traced.
      drawn_BW: int32 tokens that the full model draws after positions begin, begin + 1, ...
      begin_B: int32 first position of each row.
      target_B: int32 one past the last; equal to `begin_B` where nothing ran.

    Returns:
      (state, [B] bool rows of which a draft was wrong; the full model's token has taken its place).
    """
    b, window = drawn_BW.shape
    each = jnp.arange(b)
    column = jnp.arange(window)
    follows = begin_B[:, None] + column + 1  # position of the token that each draw is for
    drafts = jnp.take_along_axis(state.tokens, jnp.minimum(follows, state.tokens.shape[1] - 1), axis=1)
    checked = (follows <= target_B[:, None]) & (follows < state.length[:, None])
    checked &= controls.lossless[:, None]
    wrong = checked & (drafts != drawn_BW)
    rejected, first = jnp.any(wrong, axis=1), jnp.argmax(wrong, axis=1)
    drafted = jnp.sum(checked, axis=1)
    accepted = jnp.where(rejected, first, drafted)
    token = jnp.take_along_axis(drawn_BW, first[:, None], axis=1)[:, 0]
    place = jnp.where(rejected, begin_B + first + 1, state.tokens.shape[1])  # out of bounds: dropped
    length = jnp.where(rejected, place + 1, state.length)
    grown = jnp.where(rejected, jnp.maximum(accepted, 1), jnp.minimum(state.draft + 1, window - 1))
    state = dataclasses.replace(
        state,
        tokens=state.tokens.at[each, place].set(token, mode="drop"),
        exit_layers=state.exit_layers.at[each, place].set(_full_depth(state), mode="drop"),
        length=length,
        done=jnp.where(rejected, jnp.minimum(state.done, place), state.done),
        wait=jnp.where(rejected, FREE, state.wait),
        ended=jnp.where(rejected, ends(state, token, length, controls.stop_tokens), state.ended),
        draft=jnp.where(controls.adapt & (drafted > 0), grown, state.draft),
        drafted=state.drafted + drafted,
        accepted=state.accepted + accepted,
    )
    return state, rejected


def _full_depth(state: DecodeState) -> int:
    """Layers of the model."""
    return len(state.cache)

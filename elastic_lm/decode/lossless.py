"""Lossless decoding: early tokens are drafts, and the deep tick that fills their caches verifies them.

Let x_p be the token at position p, and y_p the token that the full model draws there, given the tokens
before p and the same noise. A row's noise depends on its seed and the position alone (`sampling`), and a deep
tick gives y at every pending position at once. Drafts are kept up to the first x_p != y_p; y_p takes its
place, and the tokens after it are forgotten. Every row therefore emits what the full model emits with the
same seed: token for token, with greedy decoding as with sampling.

Draft and verifier are coupled by their noise (Gumbel-max), not by an accept-reject step. This keeps the text
of full-depth sampling and needs no distribution of a draft to be stored; in return, somewhat fewer drafts are
accepted than with rejection sampling.

A row drafts until an exit is not confident, and at most `draft` tokens; the deep tick gives the next token.
The length of drafts grows by one when all of them are accepted, and shrinks to the number of accepted tokens
when one is not.

Which tokens are drafts depends on the other rows of a batch: a deep tick verifies what is pending in every
row, whichever of them it runs for, and a row that it reaches at its newest position takes the full model's
token in place of a draft. The tokens are the same either way; their depths, and the counts of drafts, are
not. Were a row verified only when it asks for it, deep ticks would run more often than they do.

Papers: LayerSkip, arXiv 2404.16710; dynamic self-speculative decoding, arXiv 2407.21082.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastic_lm.decode.logprobs import packed
from elastic_lm.decode.sampling import BROKEN, Sampling, sample
from elastic_lm.decode.state import COPIED, FREE, Controls, DecodeState, ends
from elastic_lm.models.decoder import Decoder


def look_deep(
    decoder: Decoder,
    features_BTD: jax.Array,
    positions_BT: jax.Array,
    *,
    newest_B: jax.Array,
    tokens_BS: jax.Array,
    sampling: Sampling,
    window: int,
    top: int | None = None,
) -> jax.Array:
    """The tokens that the full model draws at T <= W positions.

    Args:
      decoder: bound to its parameters.
      features_BTD: input of the final vocabulary head.
      positions_BT: int32 positions.
      newest_B: int32 index along T of each row's newest position.
      tokens_BS: int32 tokens of the rows.
      sampling: how the rows draw.
      window: W, static.
      top: likeliest tokens whose log-probabilities are computed, beside those of the drawn ones; None = none
        are, static.

    Returns:
      [B, W + 1] int32: the token drawn after each position, padded to W (`deep_tokens`), then the one drawn
      after the newest position (`newest_token`). With log-probabilities [B, W + 1, 1 + C], in which their
      bits follow each token (`deep_logprobs`).
    """
    b, t, _ = features_BTD.shape
    logits = decoder.final_logits(features_BTD)

    # Every position draws as a row of its own, with its row's tokens, settings and seed.
    tokens, settings = jax.tree.map(lambda x: jnp.repeat(x, t, axis=0), (tokens_BS, sampling))
    drawn = sample(logits.reshape(b * t, -1), tokens, positions_BT.reshape(-1) + 1, settings)
    if top is None:
        drawn = drawn.reshape(b, t)
    else:
        bits = packed(logits.reshape(b * t, -1), drawn, top)
        drawn = jnp.concatenate([drawn[:, None], bits], axis=-1).reshape(b, t, -1)

    # One array and not two: XLA copies the caches of a conditional that returns two arrays beside them.
    newest = jnp.take_along_axis(drawn, newest_B.reshape(b, *[1] * (drawn.ndim - 1)), axis=1)
    padding = [(0, 0), (0, window - t), (0, 0)][: drawn.ndim]
    return jnp.concatenate([jnp.pad(drawn, padding), newest], axis=1)


def deep_tokens(deep: jax.Array) -> jax.Array:
    """[B, W] int32: the tokens of the full model, from `look_deep`; 0 after the positions that ran."""
    return deep[:, :-1] if deep.ndim == 2 else deep[:, :-1, 0]


def newest_token(deep: jax.Array) -> jax.Array:
    """[B] int32: the full model's token after each row's newest position, from `look_deep`."""
    return deep[:, -1] if deep.ndim == 2 else deep[:, -1, 0]


def deep_logprobs(deep: jax.Array) -> jax.Array:
    """[B, W, C] int32: bits of log-probabilities at the same positions as `deep_tokens`, from `look_deep`."""
    return deep[:, :-1, 1:]


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


def final_length(state: DecodeState, controls: Controls) -> jax.Array:
    """[B] int32: the tokens of each row that no verification can take back."""
    return jnp.where(controls.lossless, jnp.minimum(state.length, state.done[-1] + 1), state.length)


def verify(
    state: DecodeState,
    controls: Controls,
    drawn_BW: jax.Array,
    begin_B: jax.Array,
    target_B: jax.Array,
    ran: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Compares the drafts of lossless rows with what the full model draws, and undoes the wrong ones.

    Args:
      state: after the deepest segment ran over positions begin .. target - 1.
      controls: traced.
      drawn_BW: int32 tokens that the full model draws after positions begin, begin + 1, ...
      begin_B: int32 first position of each row.
      target_B: int32 one past the last; equal to `begin_B` where nothing ran.
      ran: [] bool, whether the segment ran at all.

    Returns:
      (state, [B] bool rows of which a draft was wrong; the full model's token has taken its place).
    """
    depth = len(state.cache)

    # Caches stay outside: XLA copies those that pass through a conditional beside other results.
    checked, rejected_B = jax.lax.cond(
        ran,
        lambda light: _verify(light, controls, drawn_BW, begin_B, target_B, depth),
        lambda light: (light, jnp.zeros_like(light.alive)),
        dataclasses.replace(state, cache=(), exit_cache=(), hidden=()),
    )
    kept = {"cache": state.cache, "exit_cache": state.exit_cache, "hidden": state.hidden}
    return dataclasses.replace(checked, **kept), rejected_B


def _verify(
    state: DecodeState,
    controls: Controls,
    drawn_BW: jax.Array,
    begin_B: jax.Array,
    target_B: jax.Array,
    depth: int,
) -> tuple[DecodeState, jax.Array]:
    """`verify` of a state without caches, by a model of `depth` layers."""
    b, window = drawn_BW.shape
    row = jnp.arange(b)
    column = jnp.arange(window)
    capacity = state.tokens.shape[1]

    # The draw at column i is for the position after begin + i. It checks a draft where one is there already.
    drawn_for = begin_B[:, None] + column + 1
    drafts = jnp.take_along_axis(state.tokens, jnp.minimum(drawn_for, capacity - 1), axis=1)
    checked = (drawn_for <= target_B[:, None]) & (drawn_for < state.length[:, None])
    checked &= controls.lossless[:, None]
    # An exit that gave NaN is an error, not a draft that the full model may put right.
    wrong = checked & (drafts != drawn_BW) & (drafts != BROKEN)

    # Drafts are kept up to the first wrong one.
    rejected, first = jnp.any(wrong, axis=1), jnp.argmax(wrong, axis=1)
    drafted = jnp.sum(checked, axis=1)
    accepted = jnp.where(rejected, first, drafted)

    # Which of them were copied from the row's own text, and not drafted by an exit.
    depths = jnp.take_along_axis(state.exit_layers, jnp.minimum(drawn_for, capacity - 1), axis=1)
    copied = checked & (depths == COPIED)

    # The full model's token takes the place of the wrong one and is the row's newest. Rows without a wrong
    # draft write out of bounds, which JAX drops.
    token = jnp.take_along_axis(drawn_BW, first[:, None], axis=1)[:, 0]
    position = jnp.where(rejected, begin_B + first + 1, capacity)
    length = jnp.where(rejected, position + 1, state.length)

    grown = jnp.where(rejected, jnp.maximum(accepted, 1), jnp.minimum(state.draft + 1, window - 1))
    state = dataclasses.replace(
        state,
        tokens=state.tokens.at[row, position].set(token, mode="drop"),
        exit_layers=state.exit_layers.at[row, position].set(depth, mode="drop"),
        length=length,
        done=jnp.where(rejected, jnp.minimum(state.done, position), state.done),
        wait=jnp.where(rejected, FREE, state.wait),
        ended=jnp.where(rejected, ends(state, token, length, controls.stop_tokens), state.ended),
        draft=jnp.where(controls.adapt & (drafted > 0) & ~jnp.any(copied, axis=1), grown, state.draft),
        drafted=state.drafted + drafted,
        accepted=state.accepted + accepted,
        copied=state.copied + jnp.sum(copied & (column < accepted[:, None]), axis=1),
        verifications=state.verifications + (target_B > begin_B),
    )
    return state, rejected

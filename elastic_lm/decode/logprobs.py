"""Log-probabilities of emitted tokens, each under the distribution that the token was taken from.

With z the logits of the vocabulary head that gave a token (of the exit at which the token left, or of the
full model, which also gives the tokens that it verified), before penalties, temperature and truncation:

    ln p_v = z_v - ln sum_u exp z_u

While a text is decoded they lie in one array of bits beside its tokens: per position ln p of the token, then
of the K likeliest tokens, then the ids of these. Calls that do not ask have no such array, and run programs
that know nothing of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.decode.state import Controls, DecodeState

Ranked = list[tuple[int, float]]  # token ids with their log-probabilities, the likeliest first


def with_room(state: DecodeState, top: int) -> DecodeState:
    """A state in which log-probabilities will be kept: of every emitted token, and of the `top` likeliest."""
    return dataclasses.replace(state, logprobs=jnp.zeros((*state.tokens.shape, 1 + 2 * top), jnp.int32))


def likeliest(state: DecodeState) -> int | None:
    """K, or None where no log-probabilities are kept."""
    return None if state.logprobs is None else state.logprobs.shape[-1] // 2


def packed(logits_NV: jax.Array, tokens_N: jax.Array, top: int) -> jax.Array:
    """Log-probabilities as bits.

    Args:
      logits_NV: float32.
      tokens_N: int32 tokens that were taken; anything where none was.
      top: K, static.

    Returns:
      [N, 1 + 2 K] int32.
    """
    total_N1 = jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)
    taken_N1 = jnp.take_along_axis(logits_NV, jnp.maximum(tokens_N, 0)[:, None], axis=-1)
    values, ids = taken_N1 - total_N1, jnp.zeros((tokens_N.shape[0], 0), jnp.int32)
    if top:
        best_NK, ids = jax.lax.top_k(logits_NV, top)
        values = jnp.concatenate([values, best_NK - total_N1], axis=-1)
    return jnp.concatenate([jax.lax.bitcast_convert_type(values, jnp.int32), ids], axis=-1)


def emitted(state: DecodeState, logits_BV: jax.Array, tokens_B: jax.Array, rows_B: jax.Array) -> DecodeState:
    """Keeps those of the tokens that some rows are about to emit, drawn from these logits.

    Args:
      state: before the tokens are appended.
      logits_BV: float32.
      tokens_B: int32.
      rows_B: bool.
    """
    top = likeliest(state)
    if top is None:
        return state
    # An iteration in which nothing is drawn reads no logits.
    new_BC = jax.lax.cond(
        jnp.any(rows_B),
        lambda: packed(logits_BV, tokens_B, top),
        lambda: jnp.zeros((rows_B.shape[0], 1 + 2 * top), jnp.int32),
    )
    return _kept(state, new_BC[:, None], state.length[:, None], rows_B[:, None])


def verified(
    state: DecodeState, controls: Controls, new_BWC: jax.Array, begin_B: jax.Array, target_B: jax.Array
) -> DecodeState:
    """Keeps those of the tokens that the full model draws after positions begin .. target - 1.

    Args:
      state: before the drafts are compared with these tokens.
      controls: its `lossless` is read.
      new_BWC: int32 bits after each position; see `packed`.
      begin_B: int32 first position of each row.
      target_B: int32 one past the last; equal to `begin_B` where nothing ran.
    """
    position_BW = begin_B[:, None] + 1 + jnp.arange(new_BWC.shape[1])
    # Where a row is not verified, the tokens at the other positions are what its exits made of them. What is
    # written behind a wrong draft is written again before it counts.
    own_BW = controls.lossless[:, None] | (position_BW == state.length[:, None])
    return _kept(state, new_BWC, position_BW, own_BW & (position_BW <= target_B[:, None]))


def _kept(state: DecodeState, new_BTC: jax.Array, position_BT: jax.Array, keep_BT: jax.Array) -> DecodeState:
    assert state.logprobs is not None
    row = jnp.arange(position_BT.shape[0])[:, None]
    # What is not kept is written out of bounds, which JAX drops.
    position_BT = jnp.where(keep_BT, position_BT, state.logprobs.shape[1])
    return dataclasses.replace(state, logprobs=state.logprobs.at[row, position_BT].set(new_BTC, mode="drop"))


def read(bits_TC: np.ndarray) -> tuple[list[float], list[Ranked]]:
    """(log-probability, the likeliest tokens) of each of T tokens, from their bits on the host."""
    top = bits_TC.shape[-1] // 2
    values = np.ascontiguousarray(bits_TC[:, : 1 + top]).view(np.float32)
    ranked = [
        list(zip(ids.tolist(), row.tolist(), strict=True))
        for ids, row in zip(bits_TC[:, 1 + top :], values[:, 1:], strict=True)
    ]
    return values[:, 0].tolist(), ranked

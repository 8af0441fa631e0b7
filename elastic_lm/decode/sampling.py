"""From logits to tokens: greedy, temperature, top-k, top-p, min-p and repetition penalty, per row."""

import flax.struct
import jax
import jax.numpy as jnp

BROKEN = -2  # in place of a token that would have been drawn from NaN or infinity; it ends its row


@flax.struct.dataclass
class Sampling:
    """How each row of a batch draws its tokens; every field is traced.

    Attributes:
      temperature: [B] float32; 0 = greedy.
      top_k: [B] int32, keep the k most likely tokens; 0 = all.
      top_p: [B] float32, keep the smallest set whose probability reaches p; 1 = all.
      min_p: [B] float32, drop tokens less likely than min_p times the likeliest; 0 = none.
      repetition_penalty: [B] float32, divides positive and multiplies negative logits of tokens
        already in the row (CTRL, arXiv 1909.05858); 1 = off.
      seed: [B] uint32; a row's draws depend on its seed and the position alone.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array


def sample(
    logits_BV: jax.Array, tokens_BS: jax.Array, position_B: jax.Array, sampling: Sampling
) -> jax.Array:
    """Draws one token per row.

    Args:
      logits_BV: float32 logits.
      tokens_BS: int32 tokens of the rows; those below the position count as present.
      position_B: int32 position that the token will take; part of the row's random stream.
      sampling: how the rows draw.

    Returns:
      [B] int32 tokens; `BROKEN` where a logit is NaN or infinity, or all are minus infinity.
    """
    # Penalties and draws cost several passes over the vocabulary, so a batch that needs neither skips them.
    logits_BV = jax.lax.cond(
        jnp.any(sampling.repetition_penalty != 1.0),
        lambda: _penalise(logits_BV, tokens_BS, position_B, sampling.repetition_penalty[:, None]),
        lambda: logits_BV,
    )
    greedy = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # The largest is NaN as soon as one of them is: no pass of its own over the vocabulary is needed.
    finite_B = jnp.isfinite(jnp.take_along_axis(logits_BV, greedy[:, None], axis=-1)[:, 0])
    drawn = jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: jnp.where(sampling.temperature > 0, _draw(logits_BV, position_B, sampling), greedy),
        lambda: greedy,
    )
    # The host learns of it when it reads the tokens, so that no step waits for an answer.
    return jnp.where(finite_B, drawn, BROKEN)


def _penalise(
    logits_BV: jax.Array, tokens_BS: jax.Array, position_B: jax.Array, penalty_B1: jax.Array
) -> jax.Array:
    b, vocab_size = logits_BV.shape
    present = jnp.arange(tokens_BS.shape[1]) < position_B[:, None]
    columns = jnp.where(present, tokens_BS, vocab_size)  # out of bounds, which JAX drops
    seen_BV = jnp.zeros((b, vocab_size), bool).at[jnp.arange(b)[:, None], columns].set(True, mode="drop")
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, penalised, logits_BV)


def _draw(logits_BV: jax.Array, position_B: jax.Array, sampling: Sampling) -> jax.Array:
    """The largest of the kept logits plus Gumbel noise, which is a draw from their softmax."""
    warm_BV = logits_BV / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    # Which tokens are kept takes a sort of the vocabulary, which a batch that keeps all of them skips.
    kept_BV = jax.lax.cond(
        jnp.any(truncates(sampling)),
        lambda: jnp.where(keep(warm_BV, sampling), warm_BV, -jnp.inf),
        lambda: warm_BV,
    )

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits_BV.shape[-1:])

    return jnp.argmax(kept_BV + jax.vmap(noise)(sampling.seed, position_B), axis=-1).astype(jnp.int32)


def truncates(sampling: Sampling) -> jax.Array:
    """[B] bool: rows whose settings may drop tokens."""
    return (sampling.top_k > 0) | (sampling.top_p < 1.0) | (sampling.min_p > 0)


def keep(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """[B, V] bool: the tokens that top-k, then top-p, then min-p keep; the likeliest is always kept."""
    vocab_size = logits_BV.shape[-1]
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)

    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab_size), vocab_size)
    kth = jnp.take_along_axis(sorted_BV, k[:, None] - 1, axis=-1)
    sorted_BV = jnp.where(sorted_BV >= kth, sorted_BV, -jnp.inf)

    probability = jax.nn.softmax(sorted_BV, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Rounding lets `before` reach 1 in the tail, which top_p = 1 keeps.
    nucleus = (before < sampling.top_p[:, None]) | (sampling.top_p[:, None] >= 1.0)
    inside = nucleus & (probability >= sampling.min_p[:, None] * probability[:, :1])
    inside = inside.at[:, 0].set(True) & (sorted_BV > -jnp.inf)

    # Back from the sorted order: the least logit that is kept is a threshold for all tokens.
    floor = jnp.min(jnp.where(inside, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return logits_BV >= floor

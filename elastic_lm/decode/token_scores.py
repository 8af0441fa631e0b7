"""Scores of tokens by their logits: E-LANG's energy and the usual confidences, in float32.

With z the logits at one position, T a temperature and p = softmax(z), p1 >= p2 the two largest:

    energy = -T logsumexp(z / T)     max_prob = p1     entropy = -sum_v p_v ln p_v     margin = p1 - p2

A low energy is a high likelihood of the input (arXiv 2203.00748). Unlike the other three scores, it moves
with an offset of all logits.
"""

from typing import get_args

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.cascade import Centre
from elastic_lm.depth.confidence import margin, max_prob

CENTRES = get_args(Centre)


@flax.struct.dataclass
class TokenScores:
    """Scores of tokens, each [...] float32.

    Attributes:
      energy: lower is surer.
      max_prob: in [0, 1], higher is surer.
      entropy: in nats, lower is surer.
      margin: in [0, 1], higher is surer.
    """

    energy: jax.Array
    max_prob: jax.Array
    entropy: jax.Array
    margin: jax.Array


def token_scores(logits: jax.Array, temperature: float | jax.Array = 1.0) -> TokenScores:
    """All scores of tokens.

    Args:
      logits: [..., V] of any float dtype.
      temperature: T, which only the energy reads.

    Returns:
      TokenScores of [...] float32.
    """
    logits = logits.astype(jnp.float32)
    entropy = jnp.sum(jax.scipy.special.entr(jax.nn.softmax(logits, axis=-1)), axis=-1)
    return TokenScores(free_energy(logits, temperature), max_prob(logits), entropy, margin(logits))


def free_energy(
    logits: jax.Array, temperature: float | jax.Array = 1.0, centre: Centre = "none"
) -> jax.Array:
    """F = -T logsumexp(f / T) over the last axis, in float32.

    Args:
      logits: [..., C] of any float dtype, finite.
      temperature: T, positive; may be traced.
      centre: "mean" measures every logit from the mean of its row; static.

    Returns:
      [...] float32; lower = surer.
    """
    logits = logits.astype(jnp.float32)
    if centre == "mean":
        logits = logits - jnp.mean(logits, axis=-1, keepdims=True)
    return -temperature * jax.nn.logsumexp(logits / temperature, axis=-1)

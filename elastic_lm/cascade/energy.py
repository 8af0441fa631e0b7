"""The energy of a model's logits, and which of two models answers by it (E-LANG).

With f_1 .. f_C the Swift's logits (over classes, or over the vocabulary) and T a temperature:

    F(x; f) = -T ln sum_i exp(f_i(x) / T)                              free energy
    ln p(x) = -F(x) / T - ln Z                                         low energy = likely = easy
    score   = -F(x)                                                    higher = surer
    answer  = Swift(x) if score >= t, else Super(x)                    ties stay with the Swift
    cost    = C_swift + P(score < t) C_super                           the Swift always runs

and, for a generated sequence of M tokens whose distributions are f^(1) .. f^(M),

    F(x) = -(T / M) sum_m ln sum_v exp(f_v^(m)(x) / T)                 or the largest of them ("min" score)

A constant that is added to all logits changes no probability, yet it moves the energy by the same constant.
Cross-entropy does not see that constant, so training leaves it arbitrary. A threshold therefore holds only
for the model and checkpoint that it was fitted on. `centre="mean"` measures the logits from their own mean,
which also removes constants that differ from input to input.

Papers: E-LANG, arXiv 2203.00748; the energy is that of Liu et al., arXiv 2010.03759.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.cascade import Centre
from elastic_lm.decode.token_scores import free_energy

POOLS = ("mean", "min")


def energy_score(logits: jax.Array, temperature: float = 1.0, centre: Centre = "none") -> jax.Array:
    """-F(x), so that higher is surer.

    Args:
      logits: [..., C] of any float dtype, finite.
      temperature: T, positive; may be traced.
      centre: "mean" measures every logit from the mean of its row; static.

    Returns:
      [...] float32.
    """
    return -free_energy(logits, temperature, centre)


def pool(scores_BT: jax.Array, counted_BT: jax.Array, how: Literal["mean", "min"]) -> jax.Array:
    """One score per sequence from the scores of its tokens.

    Args:
      scores_BT: float32, higher = surer.
      counted_BT: bool, the tokens that count.
      how: their "mean", or their "min", that is the least sure token; static.

    Returns:
      [B] float32; NaN, which no threshold keeps, where no token counts.
    """
    count = jnp.sum(counted_BT, axis=-1)
    if how == "mean":
        return jnp.sum(jnp.where(counted_BT, scores_BT, 0.0), axis=-1) / count
    least = jnp.min(jnp.where(counted_BT, scores_BT, jnp.inf), axis=-1)
    return jnp.where(count > 0, least, jnp.nan)


def keeps(scores: np.ndarray | float, threshold: float) -> np.ndarray:
    """Whether a record is kept by the Swift; otherwise it is passed on to the Super.

    Args:
      scores: [...] of the Swift, higher = surer.
      threshold: t.

    Returns:
      [...] bool; ties are kept, NaN is passed on.
    """
    return np.asarray(scores, np.float64) >= threshold

"""Energy of a model's logits, and who answers: E-LANG's routing between a Swift and a Super model.

With f_1 .. f_C the Swift's logits (classes, or the vocabulary) and T a temperature:

    F(x; f) = -T ln sum_i exp(f_i(x) / T)                              free energy
    ln p(x) = -F(x) / T - ln Z                                         low energy = likely = easy
    score   = -F(x)                                                    higher = surer
    answer  = Swift(x) if score >= t, else Super(x)                    ties stay with the Swift
    cost    = C_swift + P(score < t) C_super                           the Swift always runs

and, of a generated sequence of M tokens whose distributions are f^(1) .. f^(M),

    F(x) = -(T / M) sum_m ln sum_v exp(f_v^(m)(x) / T)                 or the largest of them ("min" score)

A constant that is added to all logits changes no probability, yet moves the energy by the same constant.
Cross-entropy does not see it, so it is arbitrary: a threshold holds for the model and checkpoint that it was
fitted on (`calibrate.routing`), and `centre="mean"` measures logits from their own mean, which removes
constants that differ from input to input as well.

Paper: E-LANG, arXiv 2203.00748; the energy is that of Liu et al., arXiv 2010.03759.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.cascade import Centre
from elastic_lm.decode.token_scores import free_energy

POOLS = ("mean", "min")


def energy_score(logits: jax.Array, temperature: float = 1.0, centre: Centre = "none") -> jax.Array:
    """-F; arguments as in `free_energy`, higher = surer."""
    return -free_energy(logits, temperature, centre)


def pool(scores_BT: jax.Array, counted_BT: jax.Array, how: Literal["mean", "min"]) -> jax.Array:
    """One score per sequence from those of its tokens.

    Args:
      scores_BT: float32, higher = surer.
      counted_BT: bool, tokens that are read.
      how: "mean" over them, or the "min", the least sure one; static.

    Returns:
      [B] float32; NaN, which no threshold keeps, where no token counts.
    """
    count = jnp.sum(counted_BT, axis=-1)
    if how == "mean":
        return jnp.sum(jnp.where(counted_BT, scores_BT, 0.0), axis=-1) / count
    least = jnp.min(jnp.where(counted_BT, scores_BT, jnp.inf), axis=-1)
    return jnp.where(count > 0, least, jnp.nan)


def keeps(scores: np.ndarray | float, threshold: float) -> np.ndarray:
    """Whether the Swift's answer stands.

    Args:
      scores: [...] of the Swift, higher = surer.
      threshold: t.

    Returns:
      [...] bool; ties stay with the Swift, NaN goes to the Super.
    """
    return np.asarray(scores, np.float64) >= threshold


def mean_cost(swift: float, super_: float, share: float) -> float:
    """C_swift + P(Super) C_super, in the unit of both costs.

    Args:
      swift: cost of a row by the Swift.
      super_: cost of a row by the Super.
      share: of the rows that go to the Super.
    """
    return swift + share * super_

"""Tilts with which routers that read states spend a budget on average; fitted once they are trained.

A tilt times the cost of a choice is added to the choice's logit: the higher the tilt, the more is spent.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Params
from elastic_lm.width.picking import Picking, row_mean
from elastic_lm.width.trained_routers import shares

STEEPEST = 100.0  # logits by which the widest tilt tells the menu's nearest costs apart
HALVINGS = 24  # of the interval that a tilt is looked for in
TILT_BATCHES = 4  # held-out batches on which routers that read states are held to their budgets


def fit_tilts(picking: Picking, params: Params, batches: Sequence[Batch]) -> tuple[float, ...]:
    """Tilts with which routers that read states spend each anchor on average over some text.

    Args:
      picking: whose routers read states.
      params: model, stacked, and trained routers.
      batches: text that budgets are to be met on; batches count alike.

    Returns:
      One tilt per anchor, found by halving an interval: what is spent is at most the anchor, and as near to
      it as the interval is small; 0 for the whole model.
    """
    # A tilt of +- `widest` makes every token take the most expensive, or the cheapest, choices.
    costs_of = shares(picking.table, picking.shape.menu)
    steps = np.concatenate([np.diff(np.asarray(costs)).ravel() for costs in costs_of.values()])
    widest = STEEPEST / np.min(steps[steps > 0], initial=1.0)

    @jax.jit
    def spent(params: Params, batch: Batch, budget: jax.Array, tilt: jax.Array) -> jax.Array:
        budget_B = jnp.full(batch.tokens.shape[:1], budget)
        return row_mean(picking.costs(picking.forward(params, batch, budget_B, tilt=tilt)[1]), batch)

    def fit(anchor: float) -> float:
        # What is spent rises with the tilt. `low` is the highest tilt so far that keeps the budget.
        low, high = -widest, widest
        for _ in range(HALVINGS):
            tilt = (low + high) / 2
            fits = np.mean([spent(params, batch, anchor, tilt) for batch in batches]) <= anchor
            low, high = (tilt, high) if fits else (low, tilt)
        return float(low)

    return (*(fit(anchor) for anchor in picking.shape.anchors[:-1]), 0.0)

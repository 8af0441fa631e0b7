"""Trained routers of states as a decoder: one program for all budgets, tokens and prompts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config import ModelConfig
from elastic_lm.elastic import Budget
from elastic_lm.methods.routers import Routers, shares
from elastic_lm.models.decoder import Params
from elastic_lm.models.routed_decoder import ROUTING, RoutedConfig, prompt_choices, routed_params
from elastic_lm.nn.router import budget_code
from elastic_lm.plain import require

# Static: the config. Traced: everything else.
jit_choices = jax.jit(prompt_choices, static_argnames="config")


def routed_model(config: ModelConfig, params: Params, routers: Routers) -> tuple[RoutedConfig, Params]:
    """A model whose layers choose for every token.

    Args:
      config: the whole model, with or without exits.
      params: its canonical parameters; the layers' are copied into nested blocks.
      routers: that read states.

    Returns:
      (config, parameters without `ROUTING`).
    """
    shape = routers.shape
    routed = RoutedConfig.of(config, shape.menu, router_width=shape.width)
    costs = shares(routers.table, shape.menu)
    return routed, routed_params(routed, params, routers.params["layers"], costs)


def routing(routers: Routers, budget: Budget) -> dict[str, Any]:
    """What tells the routers about a budget, the `ROUTING` of `routed_model`.

    Args:
      routers: that read states.
      budget: what a token may cost on average over text like that which the tilts were fitted on.

    Raises:
      ValueError: see `check_routed`.
    """
    check_routed(routers, budget)
    anchors = routers.shape.anchors
    share = budget.amount / routers.table.range(routers.shape.menu)[1]
    tilt = np.interp(share, anchors, routers.tilts)
    return {"code": budget_code(jnp.float32(share), anchors), "tilt": jnp.float32(tilt)}


def check_routed(routers: Routers, budget: Budget) -> None:
    """Checks that routers that read states can keep a budget.

    Raises:
      ValueError: it is of another kind than their tilts were fitted for, or below what they were trained for.
    """
    table, menu = routers.table, routers.shape.menu
    fix = f"these routers were fitted to budgets of {table.kind}; ask for that, or train others"
    require(budget.kind == table.kind, f"budget.{budget.kind}", budget.amount, fix)
    table.check(budget, menu)
    least = routers.shape.anchors[0] * table.range(menu)[1]
    fix = f"these routers were trained for {least:.6g} and more; train others with a lower train.budgets"
    require(budget.amount >= least * (1 - 1e-6), f"budget.{budget.kind}", budget.amount, fix)


def for_prompts(
    config: RoutedConfig, params: Params, tokens_BP: jax.Array, length_B: jax.Array
) -> tuple[RoutedConfig, Params]:
    """The same model with choices fixed for every row by its prompt; arguments as in `prompt_choices`."""
    chosen = jit_choices(config, params, tokens_BP, length_B)
    return dataclasses.replace(config, per_token=False), {**params, ROUTING: chosen}

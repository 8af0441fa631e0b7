"""Trained routers of states as a decoder: one program for all budgets, tokens and prompts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config import ModelConfig
from elastic_lm.cost import CostTable
from elastic_lm.elastic import Budget
from elastic_lm.methods.routers import Routers
from elastic_lm.models.decoder import Params
from elastic_lm.models.routed_decoder import ROUTING, RoutedConfig, prompt_choices, routed_params
from elastic_lm.nn.router import budget_code

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
    shape, table = routers.shape, routers.table
    routed = RoutedConfig.of(config, shape.menu, router_width=shape.width)
    whole = table.range(shape.menu)[1]
    costs = {
        "heads": jnp.asarray([[h[-1] for h in a] for a in table.attention]) / whole,
        "mlp": jnp.asarray(table.mlp) / whole,
    }
    return routed, routed_params(routed, params, routers.params["layers"], costs)


def routing(routers: Routers, table: CostTable, budget: Budget) -> dict[str, Any]:
    """What tells the routers about a budget, the `ROUTING` of `routed_model`.

    Args:
      routers: that read states.
      table: of the budget's kind.
      budget: what a token may cost on average over text like that which the tilts were fitted on.

    Raises:
      ValueError: the budget cannot be met.
    """
    menu, anchors = routers.shape.menu, routers.shape.anchors
    table.check(budget, menu)
    share = budget.amount / table.range(menu)[1]
    tilt = np.interp(share, anchors, routers.tilts)
    return {"code": budget_code(jnp.float32(share), anchors), "tilt": jnp.float32(tilt)}


def for_prompts(
    config: RoutedConfig, params: Params, tokens_BP: jax.Array, length_B: jax.Array
) -> tuple[RoutedConfig, Params]:
    """The same model with choices fixed for every row by its prompt; arguments as in `prompt_choices`."""
    chosen = jit_choices(config, params, tokens_BP, length_B)
    return dataclasses.replace(config, per_token=False), {**params, ROUTING: chosen}

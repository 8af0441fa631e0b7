"""Routers in a training run: what they choose from, what it costs, and where they end up."""

import itertools
from collections.abc import Iterable, Mapping

import numpy as np
from jax.sharding import Mesh

from elastic_lm.checkpoint import load_menu
from elastic_lm.config import ModelConfig, TrainConfig
from elastic_lm.cost import CostTable, Load, counted_table
from elastic_lm.elastic import Menu
from elastic_lm.latency_table import LatencyTable
from elastic_lm.methods.routers import Routers, RouterShape
from elastic_lm.methods.routing import ROUTERS, RouterTraining, fit_tilts
from elastic_lm.models.decoder import Params
from elastic_lm.plain import require
from elastic_lm.train.step import place_batch

TILT_BATCHES = 4  # held-out batches on which routers that read states are held to their budgets


def router_training(train: TrainConfig, model: ModelConfig) -> RouterTraining:
    """The method that a training config describes.

    Args:
      train: its init_from holds the menu, and routers where those are to be trained on.
      model: the model, without exits.

    Returns:
      The method.

    Raises:
      FileNotFoundError: init_from has no menu, or there is no latency table.
      ValueError: the budgets cannot be met, the table is of another model, menu or device, or the routers in
        init_from are of another form.
    """
    menu = load_menu(train.init_from)
    table = cost_table(train, model, menu)
    shape = RouterShape(model, menu, train.budgets, train.reads, train.router_width)
    return RouterTraining(
        shape,
        table,
        train.steps,
        train.scheme,
        initial_routers(train, shape),
        train.train_model,
        train.budget_weight,
        train.distil,
        train.surrogate_error,
        train.seed,
        train.loss_chunk,
        train.remat,
    )


def cost_table(train: TrainConfig, model: ModelConfig, menu: Menu) -> CostTable:
    """Costs of a menu, of the kind that the budgets are in; raises as `router_training` does."""
    if train.priced == "latency_ms":
        return LatencyTable.load(train.latency_table).checked(model, menu)
    return counted_table(model, menu, train.priced, Load(context=train.context))


def initial_routers(train: TrainConfig, shape: RouterShape) -> Params | None:
    """Routers beside the model, to be trained on; None where there are none."""
    try:
        found = Routers.load(train.init_from, shape.config)
    except FileNotFoundError:
        return None
    for name, field in (("budgets", "anchors"), ("reads", "reads"), ("router_width", "width")):
        value, own = getattr(shape, field), getattr(found.shape, field)
        fix = f"the routers in {train.init_from} have {own!r}; set that, or take a model without routers"
        require(value == own, f"train.{name}", value, fix)
    return found.params


def check_held_out(method: RouterTraining, held_out: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Checks that routers that read states have text to be held to their budgets on.

    Raises:
      ValueError: they have none.
    """
    if method.shape.reads == "hidden" and next(iter(held_out), None) is None:
        fix = "such routers are held to budgets on held-out text: name more in data.eval_paths"
        raise ValueError(f"train.reads={method.shape.reads!r}: {fix}")


def finished_routers(
    method: RouterTraining, params: Params, held_out: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> Routers:
    """Trained routers, those that read states tilted towards their budgets.

    Args:
      method: that trained them.
      params: model, stacked, and routers.
      held_out: batches on which routers that read states are held to their budgets.
      mesh: where `params` are.
    """
    tilts: tuple[float, ...] = ()
    if method.shape.reads == "hidden":
        batches = [place_batch(batch, mesh) for batch in itertools.islice(held_out, TILT_BATCHES)]
        tilts = fit_tilts(method, params, batches)
    return Routers(method.shape, params[ROUTERS], method.table, tilts)

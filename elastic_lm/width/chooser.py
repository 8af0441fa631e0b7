"""Budgets: which sub-network of an elastic model may be served for one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require, require_choice
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.cost.counted import CostTable, Workload, counted_table
from elastic_lm.models.decoder import Params
from elastic_lm.width.nested_decoder import ROUTING, NestedConfig, nested_params, prompt_choices
from elastic_lm.width.router import budget_code
from elastic_lm.width.search import uniform_subnet
from elastic_lm.width.search_space import check_shape
from elastic_lm.width.trained_routers import DESCRIPTION, Routers, shares

Per = Literal["token", "prompt"]

MEASURE = (
    "milliseconds are measured, not counted: elastic-lm latency build --model DIR --out latency.json, then "
    "elastic.with_latency(el.LatencyTable.load('latency.json'))"
)


class Measured(Protocol):
    """What is needed of a latency table (`latency_table.LatencyTable`)."""

    def checked(self, config: ModelConfig, menu: Menu, source: str) -> CostTable:
        """Milliseconds per decoded step; raises ValueError where they are not of this model and device."""
        ...


@dataclasses.dataclass(frozen=True)
class SubnetChooser:
    """An elastic model's choices, what they cost, and who makes them.

    Costs are those of the model without its exits.
    """

    config: ModelConfig  # the whole model
    menu: Menu  # the choices that it was made elastic for
    table: CostTable | None = None  # measured milliseconds (`with_latency`); other costs are counted
    choose: Callable[[Budget], Subnet] | None = None  # for less than the whole model costs; None = search
    workload: Workload = dataclasses.field(default=Workload())  # at which FLOPs and bytes are counted
    routers: Routers | None = None  # learned; choose where `choose` does not
    per: Per = "token"  # routers that read states: who has widths of its own

    def __post_init__(self) -> None:
        self.menu.sizes(self.config)
        require_choice("elastic.per", self.per, get_args(Per))
        if self.routers is not None:
            fix = f"the routers choose from {self.routers.shape.menu}; take their menu, or train others"
            require(self.routers.shape.menu == self.menu, "elastic.menu", self.menu, fix)
            sizes = [
                [c.sizes(i) for i in range(c.n_layers)] for c in (self.config, self.routers.shape.config)
            ]
            fix = f"the routers are of a model of {sizes[1]}; train others for this one"
            require(sizes[0] == sizes[1], "elastic.config, sizes of its layers", sizes[0], fix)
        if self.table is not None:
            fix = "must be a CostTable; hand a latency table to with_latency, which checks it"
            require(isinstance(self.table, CostTable), "elastic.table", type(self.table).__name__, fix)
            check_shape("elastic.table", self.table.attention, self.table.mlp, self.config, self.menu)

    @classmethod
    def load(cls, folder: str | Path, config: ModelConfig | None = None) -> "SubnetChooser":
        """Reads what a checkpoint says about its choices, its routers where it has some.

        Args:
          folder: checkpoint of an elastic model (`checkpoint.save_model`).
          config: the model as it was loaded, where that is in another dtype; None = as in the checkpoint.

        Raises:
          FileNotFoundError: the folder is no checkpoint, or has no menu.
          ValueError: a file is damaged, or the menu does not fit the model.
        """
        from elastic_lm.checkpoints.native import load_config, load_menu

        found = config or load_config(folder)
        if not isinstance(found, ModelConfig):
            raise ValueError(f"{folder}: holds no decoder, and only those are elastic in width; name one")
        config = found
        routed = (Path(folder) / DESCRIPTION).is_file()
        return cls(config, load_menu(folder), routers=Routers.load(folder, config) if routed else None)

    def with_latency(self, table: Measured, source: str = "latency table") -> "SubnetChooser":
        """The same with measured milliseconds, for budgets of latency.

        Args:
          table: of this model, menu and device; budgets are then about its batch and context.
          source: the table's name in messages, e.g. its file.

        Raises:
          ValueError: the table is about another model, menu or device.
        """
        return dataclasses.replace(self, table=table.checked(self.config, self.menu, source))

    def subnet(self, budget: Budget) -> Subnet:
        """The sub-network to serve for a budget.

        Args:
          budget: what it may cost.

        Returns:
          The whole model where the budget allows it. Else what `choose` or the routers say or, without
          either, the dearest sub-network within the budget whose layers all make the same choices
          (`search.uniform_subnet`). Routers of another kind of cost get the same share of it.

        Raises:
          ValueError: the budget is below the least possible, or of a kind that no table is there for, or
            routers read states, so that no sub-network is fixed.
        """
        table = self.costs(budget.kind)
        table.check(budget, self.menu)
        if budget.amount >= table.range(self.menu)[1]:
            return Subnet.full(self.config)
        if self.choose is not None:
            return self.choose(budget)
        if self.routers is not None:
            return dataclasses.replace(self.routers, table=table).subnet(budget)
        return uniform_subnet(self.config, self.menu, table, budget)

    def is_routed(self, budget: Budget) -> bool:
        """Whether routers that read states choose for a budget: while text is made, not before.

        Raises:
          ValueError: such routers cannot keep the budget (`routed.check_routed`), or they were fitted to
            other milliseconds than those of this device.
        """
        if self.routers is None or self.routers.shape.reads != "hidden" or self.choose is not None:
            return False
        if budget.kind == "latency_ms":
            fix = "the routers were fitted to another latency table; train them with this one"
            own = self.costs(budget.kind)
            require(own == self.routers.table, "elastic.table", own.range(self.menu), fix)
        if budget.kind == self.routers.table.kind:
            whole = self.routers.table.range(self.menu)[1]
            if budget.amount >= whole:
                return False
        check_routed(self.routers, budget)
        return True

    def costs(self, kind: str) -> CostTable:
        """Costs of every choice.

        Args:
          kind: a field of `Budget`.

        Raises:
          ValueError: it is latency, and there is no table; or the menu offers widths of the whole model.
        """
        if self.table is not None and self.table.kind == kind:
            return self.table
        if self.routers is not None and self.routers.table.kind == kind != "latency_ms":
            return self.routers.table  # at the context that they were trained for
        require(kind != "latency_ms", "elastic.table", self.table and self.table.kind, MEASURE)
        return counted_table(self.config, self.menu, kind, self.workload)

    def check(self, config: ModelConfig) -> None:
        """Checks that this is about a model.

        Args:
          config: the whole model; its exits do not matter.

        Raises:
          ValueError: names the first field that differs.
        """
        for field in (f.name for f in dataclasses.fields(ModelConfig) if f.name != "exits"):
            value, own = getattr(self.config, field), getattr(config, field)
            fix = f"the sampler's model has {own!r}; el.Elastic.load(folder, model.config) takes the latter"
            require(value == own, f"elastic.config.{field}", value, fix)


# Static: the config. Traced: everything else.
jit_choices = jax.jit(prompt_choices, static_argnames="config")


def routed_model(config: ModelConfig, params: Params, routers: Routers) -> tuple[NestedConfig, Params]:
    """A model whose layers choose for every token.

    Args:
      config: the whole model, with or without exits.
      params: its canonical parameters; the layers' are copied into nested blocks.
      routers: that read states.

    Returns:
      (config, parameters without `ROUTING`).
    """
    shape = routers.shape
    routed = NestedConfig.of(config, shape.menu, router_width=shape.width)
    costs = shares(routers.table, shape.menu)
    return routed, nested_params(routed, params, routers.params["layers"], costs)


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
    config: NestedConfig, params: Params, tokens_BP: jax.Array, length_B: jax.Array
) -> tuple[NestedConfig, Params]:
    """The same model with choices fixed for every row by its prompt; arguments as in `prompt_choices`."""
    chosen = jit_choices(config, params, tokens_BP, length_B)
    return dataclasses.replace(config, per_token=False), {**params, ROUTING: chosen}

"""Chooses the sub-network to serve for a budget."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require, require_choice
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.cost.counted import CostTable, Workload, counted_table
from elastic_lm.cost.latency_table import LatencyTable
from elastic_lm.files.hub import local_model
from elastic_lm.models.decoder import Params
from elastic_lm.width.nested_decoder import WIDTH_INPUTS, NestedConfig, nested_params, prompt_choices
from elastic_lm.width.router import budget_code
from elastic_lm.width.search import uniform_subnet
from elastic_lm.width.search_space import check_shape
from elastic_lm.width.trained_routers import DESCRIPTION, Routers, shares

Per = Literal["token", "prompt"]


@dataclasses.dataclass(frozen=True)
class SubnetChooser:
    """The choices of an elastic model, what they cost, and who makes them.

    Costs are those of the model without its exits.

    Raises:
      ValueError: the menu, the routers or the table do not fit the model; names field, value and fix.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      config = tiny_config(elastic_groups=16)  # in earnest: `el.SubnetChooser.load(folder)`
      chooser = el.SubnetChooser(config, el.Menu(mlp=(0.25, 0.5, 1.0), heads=(0.5, 1.0)))
      least, whole = chooser.costs("parameters").range(chooser.menu)
      subnet = chooser.subnet(el.Budget(parameters=0.8 * whole))
      print(subnet.mlp, subnet.heads)  # of every layer
      ```
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
            self._check_routers(self.routers)
        if self.table is not None:
            require(
                isinstance(self.table, CostTable),
                "elastic.table",
                type(self.table).__name__,
                "must be a CostTable; hand a latency table to with_latency, which checks it",
            )
            check_shape("elastic.table", self.table.attention, self.table.mlp, self.config, self.menu)

    def _check_routers(self, routers: Routers) -> None:
        require(
            routers.shape.menu == self.menu,
            "elastic.menu",
            self.menu,
            f"the routers choose from {routers.shape.menu}; take their menu, or train others",
        )
        own, theirs = (
            [config.sizes(i) for i in range(config.n_layers)]
            for config in (self.config, routers.shape.config)
        )
        require(
            own == theirs,
            "elastic.config, sizes of its layers",
            own,
            f"the routers are of a model of {theirs}; train others for this one",
        )

    @classmethod
    def load(cls, folder: str | Path, config: ModelConfig | None = None) -> "SubnetChooser":
        """Reads a checkpoint's menu, and its routers where it has some.

        Args:
          folder: checkpoint of an elastic model.
          config: the model as it was loaded, where that is in another dtype; None = as in the checkpoint.

        Returns:
          The chooser, which counts costs; `with_latency` adds measured milliseconds.

        Raises:
          FileNotFoundError: the folder is no checkpoint, or has no menu.
          ValueError: a file is damaged, or the menu does not fit the model.
        """
        # Here, because orbax takes long to import and only checkpoints need it.
        from elastic_lm.checkpoints.native import load_config, load_menu

        config_found = config or load_config(folder)
        if not isinstance(config_found, ModelConfig):
            raise ValueError(f"{folder}: holds no decoder, and only those are elastic in width; name one")

        menu = load_menu(folder)
        has_routers = (local_model(folder, weights=False) / DESCRIPTION).is_file()
        return cls(config_found, menu, routers=Routers.load(folder, config_found) if has_routers else None)

    def with_latency(self, table: LatencyTable, source: str = "latency table") -> "SubnetChooser":
        """The same chooser with measured milliseconds, for budgets of latency.

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
          The whole model where the budget allows it. Else what `choose` or the routers say. Without either,
          the most expensive sub-network within the budget whose layers all make the same choices. Routers
          that were trained for another kind of cost get the same share of it.

        Raises:
          ValueError: the budget is below the least possible, or of a kind that no table is there for, or
            routers read states, so that no sub-network is fixed.
        """
        fix = "a menu says what sub-networks cost, not how good they are; el.choose reads it, leave it out"
        require(budget.quality is None, "budget.quality", budget.quality, fix)
        table = self.costs(budget.kind)
        budget = table.check(budget, self.menu)
        if budget.amount >= table.range(self.menu)[1]:
            return Subnet.full(self.config)

        if self.choose is not None:
            return self.choose(budget)
        if self.routers is not None:
            return dataclasses.replace(self.routers, table=table).subnet(budget)
        return uniform_subnet(self.config, self.menu, table, budget)

    def chooses_while_decoding(self, budget: Budget) -> bool:
        """Whether routers that read states choose for a budget, so that no sub-network is fixed before.

        Args:
          budget: what the model that runs may cost.

        Returns:
          False where `subnet` chooses: there are no such routers, or the budget allows the whole model.

        Raises:
          ValueError: such routers cannot keep the budget, or they were fitted to other milliseconds than
            those of this device.
        """
        if self.routers is None or self.routers.shape.reads != "hidden" or self.choose is not None:
            return False
        if budget.quality is not None:
            return False  # which `subnet` refuses

        fitted = self.routers.table
        if budget.kind == "latency_ms":
            table = self.costs(budget.kind)
            require(
                table == fitted,
                "elastic.table",
                table.range(self.menu),
                "the routers were fitted to another latency table; train them with this one",
            )
        whole = fitted.range(self.menu)[1]
        if budget.kind == fitted.kind and budget.of(whole).amount >= whole:
            return False
        check_router_budget(self.routers, budget)
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

        require(
            kind != "latency_ms",
            "elastic.table",
            self.table and self.table.kind,
            "milliseconds are measured, not counted: elastic-lm latency build --model DIR --out latency.json,"
            " then chooser.with_latency(el.LatencyTable.load('latency.json'))",
        )
        return counted_table(self.config, self.menu, kind, self.workload)

    def check(self, config: ModelConfig) -> None:
        """Checks that this chooser is about a model.

        Args:
          config: the whole model; its exits do not matter.

        Raises:
          ValueError: names the first field that differs.
        """
        for field in (f.name for f in dataclasses.fields(ModelConfig) if f.name != "exits"):
            value, wanted = getattr(self.config, field), getattr(config, field)
            require(
                value == wanted,
                f"elastic.config.{field}",
                value,
                f"the sampler's model has {wanted!r}; el.SubnetChooser.load(folder, model.config) takes it",
            )


def nested_model(config: ModelConfig, params: Params, routers: Routers) -> tuple[NestedConfig, Params]:
    """A model whose layers ask routers for their widths, for every token.

    Args:
      config: the whole model, with or without exits.
      params: its canonical parameters; the layers' are copied into nested blocks.
      routers: that read states.

    Returns:
      (config, parameters without `WIDTH_INPUTS`, which `budget_inputs` gives).
    """
    shape = routers.shape
    nested = NestedConfig.of(config, shape.menu, router_width=shape.width)
    costs = shares(routers.table, shape.menu)
    return nested, nested_params(nested, params, routers.params["layers"], costs)


def budget_inputs(routers: Routers, budget: Budget) -> dict[str, Any]:
    """What tells the routers about a budget, the `WIDTH_INPUTS` of a `nested_model`.

    Args:
      routers: that read states.
      budget: what a token may cost on average over text like that which the tilts were fitted on.

    Returns:
      {"code": [A] float32, "tilt": float32 scalar}.

    Raises:
      ValueError: the routers cannot keep the budget.
    """
    amount = check_router_budget(routers, budget).amount
    anchors = routers.shape.anchors
    share = amount / routers.table.range(routers.shape.menu)[1]
    tilt = np.interp(share, anchors, routers.tilts)
    return {"code": budget_code(jnp.float32(share), anchors), "tilt": jnp.float32(tilt)}


def check_router_budget(routers: Routers, budget: Budget) -> Budget:
    """Checks that routers that read states can keep a budget.

    Returns:
      The budget as an amount.

    Raises:
      ValueError: it is of another kind than their tilts were fitted for, or below what they were trained for.
    """
    table, menu = routers.table, routers.shape.menu
    require(
        budget.kind == table.kind,
        f"budget.{budget.kind}",
        budget.given,
        f"these routers were fitted to budgets of {table.kind}; ask for that, or train others",
    )
    found = table.check(budget, menu)

    least = routers.shape.anchors[0] * table.range(menu)[1]
    require(
        found.amount >= least * (1 - 1e-6),  # a budget that is this share of the whole, but for rounding
        f"budget.{budget.kind}",
        budget.given,
        f"these routers were trained for {least:.6g} and more; train others with a lower method.budgets",
    )
    return found


# Static: the config. Traced: everything else.
jit_prompt_choices = jax.jit(prompt_choices, static_argnames="config")


def with_prompt_choices(
    config: NestedConfig, params: Params, tokens_BP: jax.Array, length_B: jax.Array
) -> tuple[NestedConfig, Params]:
    """The same model with widths that are fixed for every row, as its routers choose them for the prompts.

    Args:
      config: from `nested_model`; static.
      params: its parameters, with `WIDTH_INPUTS`.
      tokens_BP: int32 prompts, padded on the right.
      length_B: int32 prompt lengths.
    """
    chosen = jit_prompt_choices(config, params, tokens_BP, length_B)
    return dataclasses.replace(config, per_token=False), {**params, WIDTH_INPUTS: chosen}

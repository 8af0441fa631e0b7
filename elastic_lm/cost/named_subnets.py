"""Named sub-networks with their parameters, and those that an elastic model has from its training."""

import itertools
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.config.subnet_table import ModelSizes, NamedSubnet, SubnetTable, name_of
from elastic_lm.cost.counted import model_cost

AXES = ("mlp", "heads", "groups")


def named_subnet(config: ModelConfig, subnet: Subnet, name: str = "", origin: str = "") -> NamedSubnet:
    """A sub-network with its name and its parameters, of which nothing is measured.

    Args:
      config: the whole model.
      subnet: of it.
      name: "" = one that says what it keeps (`config.subnet_table.name_of`).
      origin: where it comes from, if not from this package.

    Raises:
      ValueError: it is no sub-network of this model, or the name holds other characters than a name may.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config()
      half = el.width.named_subnet(config, el.Subnet.uniform(config, mlp=0.5))
      whole = el.width.named_subnet(config, el.Subnet.full(config))
      assert (half.name, whole.name) == ("w50", "whole")
      assert half.parameters < whole.parameters
      ```
    """
    subnet.check(config)
    parameters = model_cost(subnet.sliced(config).with_exits(())).parameters
    return NamedSubnet(name or name_of(config, subnet), subnet, parameters, origin=origin)


def default_subnets(config: ModelConfig, menu: Menu) -> SubnetTable:
    """The named sub-networks of a model that was made elastic: a few that span its menu.

    They are every combination of widths that is the same in all layers, every depth with all widths whole,
    and the menu's smallest sub-network.

    Args:
      config: the whole model.
      menu: the choices that it was made elastic for.

    Returns:
      The table, the smallest number of parameters first and the whole model last.

    Raises:
      ValueError: the menu does not fit the model.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config()
      menu = el.Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0), dropped=(2,))
      table = el.width.default_subnets(config, menu)
      assert set(table) == {"d3-w50-h50", "w50-h50", "d3", "w50", "h50", "whole"}
      assert list(table)[-1] == "whole"
      ```
    """
    menu.sizes(config)
    found: dict[Subnet, None] = {}
    for shares in itertools.product(*(getattr(menu, axis) for axis in AXES)):
        widths: dict[str, Any] = dict(zip(AXES, shares, strict=True))
        found[Subnet.uniform(config, **widths)] = None
    for count in range(len(menu.dropped) + 1):
        kept = [i for i in range(config.n_layers) if i not in menu.dropped[:count]]
        found[Subnet.uniform(config, layers=kept)] = None
    found[menu.smallest(config)] = None

    named = sorted((named_subnet(config, subnet) for subnet in found), key=lambda one: one.parameters)
    distinct = {one.name: one for one in named}  # shares that differ by less than a name tells are one
    return SubnetTable(ModelSizes.of(config), tuple(distinct.values()))

"""Which named sub-networks a model is saved with."""

from pathlib import Path

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.config.subnet_table import SubnetTable
from elastic_lm.cost.named_subnets import default_subnets
from elastic_lm.files.subnet_files import carried_subnets, subnet_weights
from elastic_lm.models.decoder import Params
from elastic_lm.models.registry import Config


def table_to_save(
    config: Config,
    params: Params,
    menu: Menu | None,
    subnets: SubnetTable | None,
    source: str | Path | None,
) -> SubnetTable | None:
    """The table that goes beside a model, with what was measured of these weights alone.

    Args:
      config: the model.
      params: its parameters.
      menu: the choices that it was made elastic for; None = it was not.
      subnets: the table that the caller has; None = that of the source, and what spans the menu.
      source: the folder that the model comes from; None = there is none.

    Returns:
      The table; None where the model has no named sub-networks.

    Raises:
      ValueError: the caller's table is that of another model.
    """
    if not isinstance(config, ModelConfig):
        return None
    if subnets is not None:
        subnets.check(config)
        return subnets.of_weights(subnet_weights(config, params))

    found = carried_subnets(source, config, params)
    if menu is None:
        return found
    try:
        defaults = default_subnets(config, menu)
    except ValueError:
        return found  # whoever serves such a menu is told; a model that was trained is saved nevertheless
    if found is None:
        return defaults.of_weights(subnet_weights(config, params))
    known = {one.subnet for one in found.subnets}
    return found.adding(
        [one for one in defaults.subnets if one.subnet not in known and one.name not in found]
    )

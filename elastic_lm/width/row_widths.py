"""Rows of one batch that run at widths of their own, by the nested form of a model (`width.nested_decoder`).

Every row names a sub-network. Together they make a menu, whose blocks a batch reads as far as any of its rows
needs them; what a row leaves out is masked for it, so that a batch takes as long as its widest row does in
every layer. The rows' choices are traced: one program serves all mixtures of the same widths. Exits keep
their own modules whole, where a slice cuts those of the kinds `mlp` and `block` like their layer.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu, Subnet


def menu_of(config: ModelConfig, subnets: Sequence[Subnet]) -> Menu:
    """The menu that all of some sub-networks are chosen from.

    Args:
      config: the whole model.
      subnets: of it, that differ in neurons and heads alone.

    Raises:
      ValueError: one leaves out layers, key/value groups or channels, or a width of one layer gives no whole
        number in another one.
    """
    full = Subnet.full(config)
    mlp, heads = {1.0}, {1.0}
    for subnet in subnets:
        subnet.check(config)
        for field in ("layers", "groups", "d_model"):
            fix = "rows of one batch differ in neurons and heads alone; serve this one in a batch of its own"
            require(
                getattr(subnet, field) == getattr(full, field), f"subnet.{field}", getattr(subnet, field), fix
            )
        mlp |= {part / whole for part, whole in zip(subnet.mlp, full.mlp, strict=True)}
        heads |= {part / whole for part, whole in zip(subnet.heads, full.heads, strict=True)}
    menu = Menu(mlp=tuple(sorted(mlp)), heads=tuple(sorted(heads)))
    menu.sizes(config)
    return menu


def row_choices(config: ModelConfig, menu: Menu, subnets: Sequence[Subnet]) -> dict[str, jax.Array]:
    """The `WIDTH_INPUTS` of rows.

    Args:
      config: the whole model.
      menu: from `menu_of`.
      subnets: one per row.

    Returns:
      {"heads", "mlp": [B, L] int32}, indices into the choices of every layer.
    """
    positions = {subnet: menu.positions(config, subnet) for subnet in set(subnets)}
    mlp, heads, _ = zip(*(positions[subnet] for subnet in subnets), strict=True)
    return {"heads": jnp.asarray(heads, jnp.int32), "mlp": jnp.asarray(mlp, jnp.int32)}

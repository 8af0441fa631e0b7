"""Initialisers that carry logical axis names."""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax

Initializer = Callable[..., jax.Array]


def partitioned(init: Callable[..., Any], axes: tuple[str | None, ...]) -> Initializer:
    """Tags what `init` draws with logical axis names, which `models.sharding.Rules` maps to mesh axes.

    Linen unboxes the tag when a parameter is read, so the parameter is used as a plain array.

    Args:
      init: (key, shape, dtype) -> array.
      axes: one name per dimension of the parameter; None = not split.

    Returns:
      The initialiser to give to `Module.param`.
    """
    return cast(Initializer, nn.with_logical_partitioning(init, axes))

"""What the backward pass keeps of a layer, and what it computes again (rematerialisation).

Each name keeps less than the one before it, and computes more again:

    none             everything that the gradient needs is kept
    dots             the results of all matrix products, attention's logits among them
    dots_no_batch    the results of the products with weights: projections and MLP, but no logits of attention
    full             the layer's input alone

The losses and gradients are the same up to rounding, whatever is kept.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from elastic_lm.config.checks import is_truth, require

Remat = bool | str | None  # a name; True = "full", False and None = "none"

POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}
NAMES = ("none", *POLICIES)


def check_remat(field: str, remat: Remat) -> None:
    """`require` that a value says what is recomputed.

    Args:
      field: its name in messages.
      remat: the value.
    """
    known = remat is None or is_truth(remat) or (isinstance(remat, str) and remat in NAMES)
    require(known, field, remat, f"must be True or False, or one of {', '.join(NAMES)}")


def is_recomputing(remat: Remat) -> bool:
    """Whether anything is computed again."""
    return bool(remat) and remat != "none"


def recomputed(
    function: Callable[..., Any], remat: Remat, *, static_argnums: int | tuple[int, ...] = ()
) -> Callable[..., Any]:
    """A pure function whose backward pass keeps what `remat` says.

    Args:
      function: of arrays.
      remat: what is kept; static.
      static_argnums: arguments that are no arrays.
    """
    if not is_recomputing(remat):
        return function
    return jax.checkpoint(function, policy=_policy(remat), static_argnums=static_argnums)


def recomputed_method(method: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`recomputed` of a method of a Linen module, whose parameters are arguments too.

    Args:
      method: of the class, such as `Block.__call__`.
      remat: what is kept; static.
    """
    return nn.remat(method, policy=_policy(remat)) if is_recomputing(remat) else method


def _policy(remat: Remat) -> Any:
    """jax's policy; None keeps nothing."""
    return POLICIES[remat] if isinstance(remat, str) else None

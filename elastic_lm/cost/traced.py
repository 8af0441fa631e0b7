"""FLOPs of a function as it was written, before any compiler: products of matrices in its jaxpr.

A scan counts as often as it runs, of a conditional the most expensive branch, and of a loop without a fixed
number of turns one turn. All devices together compute at least so much.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def traced_flops(function: Any, *args: Any) -> float:
    """FLOPs of one call, of all devices together; a multiplication and an addition are two.

    Args:
      function: of the arguments; traced, not run.
      *args: trees of arrays or `jax.ShapeDtypeStruct`.

    Example:
      ```python
      import jax.numpy as jnp

      from elastic_lm.cost.traced import traced_flops

      assert traced_flops(lambda x: x @ x.T, jnp.zeros((8, 16))) == 2 * 8 * 8 * 16
      ```
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            out: Any = equation.outvars[0].aval
            total += 2.0 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)
            continue
        inner = [_flops(each) for each in _jaxprs(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inner, default=0.0)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def _jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The functions that an equation calls, and not those that only describe its derivative."""
    for name, value in params.items():
        for each in value if isinstance(value, tuple | list) else (value,):
            if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun", "jvp_jaxpr_thunk"):
                continue
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each

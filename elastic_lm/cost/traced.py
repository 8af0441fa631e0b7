"""FLOPs of a function, counted in what JAX has traced of it: products of matrices, two per multiplication.

XLA's own analysis of a compiled program counts the body of a loop once, and a traced program is there before
anything is compiled. What a backward pass computes again to save memory (`jax.checkpoint`) does not count
towards what a device achieves, and does towards what it has to do.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core

UNKNOWN = math.nan
AGAIN = "rematted_computation"  # JAX's name for what is computed again
OPAQUE = ("ffi_call", "pure_callback", "io_callback")  # nobody knows what they compute
ATTENTION = {  # kernels of cuDNN, by products of the size of the logits
    "dot_product_attention_fwd": 2,
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd": 5,
    "dot_product_attention_bwd_wrapper": 5,
}


def traced_flops(jaxpr: Any, at_most: bool = False) -> float | None:
    """FLOPs of one call.

    Args:
      jaxpr: from `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`. Those of a function on a mesh are
        of all devices together.
      at_most: what devices have to do: also what is computed again, of a conditional the most expensive
        branch, and of a loop without a fixed end one turn.

    Returns:
      The FLOPs; None where they cannot be counted, or, unless `at_most`, depend on the data.

    Example:
      ```python
      import jax
      import jax.numpy as jnp

      from elastic_lm.cost.traced import traced_flops

      jaxpr = jax.make_jaxpr(lambda x: x @ x)(jnp.zeros((4, 4)))
      assert traced_flops(jaxpr) == 2 * 4 * 4 * 4
      ```
    """
    flops = _flops(jaxpr, at_most)
    return None if math.isnan(flops) else flops


def _flops(jaxpr: Any, at_most: bool) -> float:
    inner = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum((_of_equation(each, at_most) for each in inner.eqns), 0.0)


def _of_equation(equation: Any, at_most: bool) -> float:
    name, params = equation.primitive.name, equation.params
    if not at_most and AGAIN in str(equation.source_info.name_stack):
        return 0.0
    if name == "dot_general":
        return _product(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name in OPAQUE:
        return UNKNOWN
    if name in ATTENTION:
        return ATTENTION[name] * _attention_product(equation)

    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        return UNKNOWN if estimate is None else float(estimate.flops)
    parts = [_flops(part, at_most) for part in _parts(params)]
    if name == "scan":
        return params["length"] * sum(parts)
    if name == "while" and not at_most:
        return UNKNOWN if any(parts) else 0.0  # nobody knows how often it runs
    if name == "cond":
        return max(parts) if at_most or len(set(parts)) == 1 else UNKNOWN
    if name == "shard_map":
        return math.prod(params["mesh"].shape.values()) * sum(parts)
    return sum(parts, 0.0)


def _parts(params: dict[str, Any]) -> Iterator[Any]:
    """Programs inside an equation."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr | core.Jaxpr):
                yield each


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs


def _attention_product(equation: Any) -> float:
    """FLOPs of a product of queries with keys, which are [B, T, N, H], or [B, N, T, H] in layout 1."""
    query, key = (each.aval.shape for each in equation.invars[:2])
    keys = key[2 if equation.params.get("layout") else 1]
    return 2.0 * math.prod(query) * keys

"""NaN and infinity in weights and results: found when weights are read, and explained in results.

A weight that is not finite makes every answer of a model meaningless, so that loading refuses it by name. A
result that is not finite although all weights are has overflowed the dtype that it was computed in.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PIECE = 1 << 20  # values that are looked at together, so that no second copy of a tensor is made

# The bits of the exponent, all of which are set in NaN and infinity. NumPy's `isfinite` is slow for these.
EXPONENTS = {np.dtype(jnp.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}


class NotFiniteError(ValueError):
    """Weights or results hold NaN or infinity; the message names where, and what to do."""


def is_finite(values: np.ndarray) -> bool:
    """Whether a host array holds neither NaN nor infinity.

    Args:
      values: of any float dtype, bfloat16 included.

    Example:
      ```python
      import numpy as np

      from elastic_lm.models.finite import is_finite

      assert is_finite(np.ones(3))
      assert not is_finite(np.array([1.0, np.nan]))
      ```
    """
    flat = values.reshape(-1)
    exponent = EXPONENTS.get(flat.dtype)
    if exponent is not None:
        flat = flat.view(np.uint16)

    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        if exponent is None:
            good = bool(np.isfinite(piece).all())
        else:
            good = not ((piece & exponent) == exponent).any()
        if not good:
            return False
    return True


def check_tensor(where: str, values: np.ndarray) -> None:
    """Refuses a tensor that holds NaN or infinity.

    Args:
      where: file and name of the tensor, for the message.
      values: of any float dtype.

    Raises:
      NotFiniteError: it does; names the first such value.
    """
    if not is_finite(values):
        raise NotFiniteError(
            f"{where} holds {_found(values)}: the weights are damaged, or of a run that diverged; copy or "
            "convert them again, or use an earlier checkpoint"
        )


def cast_tensor(where: str, values: np.ndarray, dtype: Any) -> np.ndarray:
    """A finite tensor in another dtype.

    Args:
      where: file and name of the tensor, for the message.
      values: of any float dtype.
      dtype: wanted.

    Returns:
      The values as they are, where they have this dtype already.

    Raises:
      NotFiniteError: a value is too large for `dtype`.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)

    narrower = jnp.finfo(dtype).max < jnp.finfo(values.dtype).max
    if narrower and not is_finite(cast):
        largest = float(np.max(np.abs(values.astype(np.float64))))
        raise NotFiniteError(
            f"{where} holds values up to {largest:g}, and the largest of {np.dtype(dtype).name} is "
            f"{float(jnp.finfo(dtype).max):g}: load it with dtype 'bfloat16' or 'float32'"
        )
    return cast


def check_finite(where: str, params: Any) -> None:
    """Refuses parameters that hold NaN or infinity.

    Args:
      where: the file or folder that they are from, for the message.
      params: a tree of arrays.

    Raises:
      NotFiniteError: one does; names the first.
    """
    found = first_not_finite(params)
    if found is not None:
        name, leaf = found
        what = _found(np.asarray(leaf)) if _on_host(leaf) else "NaN or infinity"
        half = ", or too large for it: load it with dtype 'bfloat16' or 'float32'"
        raise NotFiniteError(
            f"{where}: parameter {name} holds {what}: the weights are damaged, or of a run that diverged"
            f"{half if leaf.dtype == jnp.float16 else ''}; copy or convert them again, or use an earlier "
            "checkpoint"
        )


def first_not_finite(params: Any) -> tuple[str, Any] | None:
    """The first parameter of a tree that holds NaN or infinity.

    Args:
      params: a tree of arrays; integers count as finite.

    Returns:
      (its path with slashes, the parameter), or None where all are finite.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    floats = [(path, leaf) for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    # Devices are asked about all of their arrays before the first answer is waited for.
    answers = iter(jax.device_get([_all_finite(leaf) for _, leaf in floats if not _on_host(leaf)]))
    for path, leaf in floats:
        # On a CPU, and only there, the host sees the array without a copy.
        if not (is_finite(np.asarray(leaf)) if _on_host(leaf) else bool(next(answers))):
            return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path), leaf
    return None


def overflow_error(what: str, params: Any, dtype: str) -> NotFiniteError:
    """The error for a result that is not finite: it names the first such parameter, or else the dtype.

    Args:
      what: the result, such as "prompt 0: the logits after 5 tokens".
      params: what it was computed with.
      dtype: of the activations.

    Returns:
      The error, to be raised.
    """
    found = first_not_finite(params)
    if found is not None:
        return NotFiniteError(
            f"{what} hold NaN or infinity, because parameter {found[0]} does: the weights are damaged, or of "
            "a run that diverged; load another checkpoint"
        )
    largest = float(jnp.finfo(jnp.dtype(dtype)).max)
    other = "'bfloat16' or 'float32'" if dtype == "float16" else "'float32', and look for outliers in them"
    return NotFiniteError(
        f"{what} hold NaN or infinity, though all weights are finite: something exceeds the largest value of "
        f"{dtype}, {largest:g}; load the model with dtype {other}"
    )


def overflow_once(params: Any, dtype: str) -> Callable[[], NotFiniteError]:
    """`overflow_error` for the logits of a model; the parameters are searched at the first call alone.

    Args:
      params: of the model.
      dtype: of its activations.
    """
    return functools.cache(functools.partial(overflow_error, "the logits", params, dtype))


def _found(values: np.ndarray) -> str:
    """What a tensor holds that is not finite, and where."""
    wide = values.astype(np.float32)
    bad = ~np.isfinite(wide)
    first = np.unravel_index(int(np.argmax(bad)), bad.shape)
    kind = "NaN" if np.isnan(wide[first]) else "infinity"
    return f"{kind} at {[int(i) for i in first]} ({int(bad.sum()):,} of {bad.size:,} values are not finite)"


def _on_host(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))

"""The batch that next-token training reads."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.struct
import jax

Arrays = Mapping[str, Any]  # the fields of a `Batch`, as the data pipeline yields them


@flax.struct.dataclass
class Batch:
    """A packed batch of next-token prediction.

    Attributes:
      tokens: [B, T] int32 inputs.
      targets: [B, T] int32, the token that follows each input.
      weights: [B, T] float32, how much each target counts (0 = padding or prompt).
      positions: [B, T] int32 position of each token in its document.
      segments: [B, T] int32 document id of each token; 0 = padding.
      sources: [B, T] int32 number of the file that each token comes from; None = it is not known. Nothing
        that computes reads it.

    Example:
      ```python
      import jax.numpy as jnp

      import elastic_lm as el

      tokens, ones = jnp.array([[5, 6, 7, 8]]), jnp.ones((1, 3), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.arange(3)[None], ones)
      assert batch.targets.tolist() == [[6, 7, 8]]
      ```
    """

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array
    positions: jax.Array
    segments: jax.Array
    sources: jax.Array | None = None


def as_batches(batches: Iterable[Batch | Arrays]) -> Iterator[Batch]:
    """The same batches, where some or all are given as dicts of their fields."""
    for arrays in batches:
        yield Batch(**arrays) if isinstance(arrays, Mapping) else arrays

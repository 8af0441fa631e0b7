"""Where calibrated exits fail: agreement with the full model by file, by kind of token and by context."""

from collections.abc import Sequence

import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.depth.guarantee import token_losses
from elastic_lm.depth.observations import Observations
from elastic_lm.report.slices import FailureSlices, Keys, failure_slices, length_buckets

FILE = "file"
KIND = "kind"
CONTEXT = "context"


def exit_slices(
    observations: Observations,
    thresholds: Sequence[float],
    *,
    kinds: Sequence[str] = (),
    files: Sequence[str] = (),
) -> FailureSlices:
    """Agreement under thresholds, by what the tokens are and where they stand.

    Args:
      observations: of tokens that did not choose the thresholds, with silenced exits where gates are used.
      thresholds: one per exit.
      kinds: kind of every token of the vocabulary (`data.token_kinds`), by which the text's tokens are told
        apart; () = they are not.
      files: names of the files that `Batch.sources` numbers; () = tokens are not told apart by file.

    Returns:
      The slices "file", "kind" and "context" (tokens of the document before the token that is predicted), as
      far as they are known; tokens of one row count as dependent.

    Raises:
      ValueError: a token has no kind, or a number no file.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(2,))
      tokens = random_tokens(config, batch=8, length=17)
      ones = jnp.ones((8, 16), jnp.int32)
      batch = el.data.Batch(
          tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones, sources=0 * ones
      )
      seen = el.depth.observe(config, random_params(config), [batch])
      found = el.depth.exit_slices(seen, (0.5,), files=["held_out.txt"])
      assert {one.by for one in found.slices} == {"file", "context"}
      ```
    """
    keys: dict[str, Keys] = {}
    if files and observations.source is not None:
        keys[FILE] = _named("files", files, observations.source)
    if kinds:
        keys[KIND] = _named("kinds", kinds, observations.targets)
    if observations.position is not None:
        keys[CONTEXT] = length_buckets(observations.position + 1)

    right = ~token_losses(observations, thresholds)
    return failure_slices(right, keys, groups=observations.sequence)


def _named(field: str, names: Sequence[str], numbers: np.ndarray) -> Keys:
    """The name of every number."""
    least, most = int(numbers.min()), int(numbers.max())
    require(least >= 0 and most < len(names), field, f"{len(names)} names", f"the text has number {most}")
    return [names[i] for i in numbers.tolist()]

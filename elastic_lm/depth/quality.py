"""How good every depth of a model is on held-out text."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Arrays, Batch
from elastic_lm.depth.observations import Observations, observe
from elastic_lm.depth.threshold_search import exit_outcome
from elastic_lm.models.decoder import Params

SHARED_THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(20, -1, -1))


class Decodes(Protocol):
    """A tokenizer, as far as counting bytes needs one."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


@dataclasses.dataclass(frozen=True)
class DepthQuality:
    """Quality of one exit, or of the full model (`layers` = all of them).

    Example:
      ```python
      import elastic_lm as el

      found = el.evaluate.DepthQuality(
          layers=6, nats_per_token=2.0, perplexity=7.39, accuracy=0.5, agreement=0.8
      )
      assert found.nats_per_byte is None  # no tokenizer
      ```
    """

    layers: int  # depth
    nats_per_token: float  # mean cross-entropy
    perplexity: float  # exp(nats_per_token)
    accuracy: float  # share of tokens where the likeliest token is the text's
    agreement: float  # share of tokens where the likeliest token is the full model's
    nats_per_byte: float | None = None  # cross-entropy per byte of text; None = no tokenizer to count bytes


@dataclasses.dataclass(frozen=True)
class SharedThresholdPoint:
    """What one threshold, shared by all exits, does."""

    threshold: float  # exit where the confidence is at least this
    agreement: float  # share of tokens equal to the full model's
    mean_layers: float  # mean depth at which tokens are emitted


def evaluate(
    config: ModelConfig,
    params: Params,
    batches: Iterable[Batch | Arrays],
    *,
    tokenizer: Decodes | None = None,
    chunk: int = 128,
) -> list[DepthQuality]:
    """Perplexity, accuracy and agreement of every exit and of the full model, in one pass.

    Args:
      config: the model, with or without exits; static.
      params: its parameters, canonical or stacked.
      batches: packed held-out batches, or dicts of their fields; the first batch is the largest.
      tokenizer: also report nats per byte; None = only per token.
      chunk: columns of logits alive at once; static.

    Returns:
      One entry per exit in order of depth, then the full model.

    Raises:
      ValueError: no token counts.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(2,))
      tokens = random_tokens(config, batch=4, length=17)  # in earnest: `el.data.eval_batches`
      ones = jnp.ones((4, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      for depth in el.evaluate.evaluate(config, random_params(config), [batch]):
          print(depth.layers, depth.perplexity, depth.agreement)
      ```
    """
    observations = observe(config, params, batches, chunk=chunk)
    return by_depth(observations, None if tokenizer is None else count_bytes(observations, tokenizer))


def by_depth(observations: Observations, text_bytes: int | None = None) -> list[DepthQuality]:
    """`evaluate` from observations that exist already.

    Args:
      observations: from `observe`; tokens weigh as they do there.
      text_bytes: UTF-8 bytes of the counted tokens, from `count_bytes`; None = no nats per byte.

    Returns:
      One entry per exit in order of depth, then the full model.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(2,))
      tokens = random_tokens(config, batch=4, length=17)
      ones = jnp.ones((4, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      exit_, full = el.evaluate.by_depth(el.evaluate.observe(config, random_params(config), [batch]))
      assert (exit_.layers, full.layers, full.agreement) == (2, 4, 1.0)
      ```
    """
    weights = observations.weights.astype(np.float64)
    agrees = np.column_stack([observations.agrees, np.ones(observations.tokens, bool)])

    depths = []
    for i, layers in enumerate((*observations.layers, observations.n_layers)):
        total = float(observations.nats[:, i] @ weights)
        nats = total / weights.sum()
        depths.append(
            DepthQuality(
                layers=layers,
                nats_per_token=nats,
                perplexity=math.exp(nats),
                accuracy=float(np.average(observations.correct[:, i], weights=weights)),
                agreement=float(np.average(agrees[:, i], weights=weights)),
                nats_per_byte=total / text_bytes if text_bytes else None,
            )
        )
    return depths


def count_bytes(observations: Observations, tokenizer: Decodes) -> int:
    """UTF-8 bytes of the counted tokens' text.

    Args:
      observations: from `observe`.
      tokenizer: decodes their targets, sequence by sequence.

    Returns:
      Bytes of all sequences together.
    """
    starts = np.flatnonzero(np.diff(observations.sequence)) + 1
    rows = np.split(observations.targets, starts)
    return sum(len(tokenizer.decode(row.tolist()).encode()) for row in rows)


def shared_threshold_curve(
    observations: Observations, thresholds: Sequence[float] = SHARED_THRESHOLDS
) -> list[SharedThresholdPoint]:
    """The usual picture of early exits: one threshold for all exits, swept (EE-LLM, arXiv 2312.04916).

    Calibration does better, because exits differ in how far their confidence can be trusted.

    Args:
      observations: from `observe`; every token counts the same.
      thresholds: least confidences; 1 down to 0 in steps of 0.05 unless given.

    Returns:
      One point per threshold, in their order.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(2,))
      tokens = random_tokens(config, batch=4, length=17)
      ones = jnp.ones((4, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      seen = el.evaluate.observe(config, random_params(config), [batch])
      for point in el.evaluate.shared_threshold_curve(seen, thresholds=(1.0, 0.5, 0.0)):
          print(point.threshold, point.agreement, point.mean_layers)
      ```
    """
    depths = (*observations.layers, observations.n_layers)
    points = []
    for threshold in thresholds:
        shared = (threshold,) * len(observations.layers)
        outcome = exit_outcome(observations.confidence, observations.agrees, depths, shared)
        points.append(SharedThresholdPoint(threshold, outcome.agreement, outcome.mean_layers))
    return points

"""What every training method shares: the batch it reads, its interface, and chunked cross-entropy."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config import ModelConfig
from elastic_lm.models.decoder import Params, vocab_logits

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Batch:
    """A packed batch of next-token prediction.

    Attributes:
      tokens: [B, T] int32 inputs.
      targets: [B, T] int32, the token that follows each input.
      weights: [B, T] float32, how much each target counts (0 = padding or prompt).
      positions: [B, T] int32 position of each token in its document.
      segments: [B, T] int32 document id of each token; 0 = padding.
    """

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array
    positions: jax.Array
    segments: jax.Array


AnyBatch = TypeVar("AnyBatch", contravariant=True)


class Method(Protocol[AnyBatch]):
    """A training method: which parameters train, and the loss of a batch of its kind."""

    def split(self, params: Params) -> tuple[Params, Params]:
        """Splits parameters into (trainable, frozen), two trees with disjoint top-level keys."""
        ...

    def loss(
        self, trainable: Params, frozen: Params, batch: AnyBatch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """What is minimised; pure and traced.

        Args:
          trainable: first result of `split`; the gradient is taken with respect to it.
          frozen: second result of `split`.
          batch: rows, with the `weights` of what counts.
          step: int32 scalar, optimizer steps done; the largest int32 in evaluation.

        Returns:
          (scalar float32, float32 scalars by name), each per counted token or row of the batch.
        """
        ...


@flax.struct.dataclass
class TokenSums:
    """Weighted sums over the tokens of a batch.

    Attributes:
      loss: sum of weight * token_weight * cross-entropy, in nats.
      cross_entropy: sum of weight * cross-entropy, in nats.
      correct: sum of weight where the arg max is the target.
      weight: sum of weights.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    correct: jax.Array
    weight: jax.Array


def token_sums(
    logits_BTV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    confidence_weighted: bool = False,
) -> TokenSums:
    """Next-token cross-entropy of logits.

    Args:
      logits_BTV: float32.
      targets_BT: int32 token that follows each input.
      weights_BT: float32, how much each target counts.
      confidence_weighted: see `chunked_cross_entropy`; static.

    Returns:
      TokenSums of float32 scalars.
    """
    normaliser = jax.nn.logsumexp(logits_BTV, axis=-1)
    target = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    entropy = (normaliser - target) * weights_BT
    top = jnp.max(logits_BTV, axis=-1)
    confidence = jnp.exp(jax.lax.stop_gradient(top - normaliser)) if confidence_weighted else 1.0
    return TokenSums(
        jnp.sum(entropy * confidence),
        jax.lax.stop_gradient(jnp.sum(entropy)),
        jnp.sum(weights_BT * (target >= top)),
        jnp.sum(weights_BT),
    )


def chunked_cross_entropy(
    config: ModelConfig,
    features_BTD: jax.Array,
    kernel_VD: jax.Array,
    batch: Batch,
    *,
    temperature: float = 1.0,
    confidence_weighted: bool = False,
    chunk: int = 256,
) -> TokenSums:
    """Next-token cross-entropy that never holds more than `chunk` columns of logits.

    Logits are recomputed in the backward pass, so memory is B * chunk * V whatever T and the number
    of exits are. Chunks run along T, so a batch sharded over rows stays sharded.

    Args:
      config: static; its final softcap is applied.
      features_BTD: input of the vocabulary head.
      kernel_VD: vocabulary head.
      batch: targets and weights.
      temperature: logits are divided by it; static.
      confidence_weighted: multiply each token's loss by the detached max probability (EE-Tuning's
        dynamic token weighting, not renormalised); static.
      chunk: columns of T per chunk; static.

    Returns:
      TokenSums of float32 scalars.
    """

    def one(xs: tuple[jax.Array, jax.Array, jax.Array]) -> TokenSums:
        features, targets, weights = xs
        logits = vocab_logits(config, features, kernel_VD, temperature)
        return token_sums(logits, targets, weights, confidence_weighted=confidence_weighted)

    return sum_over_chunks(one, (features_BTD, batch.targets, batch.weights), chunk)


def sum_over_chunks(function: Callable[[Any], Any], arrays: Any, chunk: int) -> Any:
    """Sums what `function` returns for pieces of `arrays`, one after the other.

    What a piece computes is forgotten, and computed again in its backward pass.

    Args:
      function: from a tree like `arrays`, with `chunk` columns, to a tree of sums. Columns that fill up
        the last piece are all zeros, weights too.
      arrays: a tree of [B, T, ...] arrays.
      chunk: columns of T per piece; static.

    Returns:
      A tree like that of `function`, summed over the pieces.
    """
    b, t = jax.tree.leaves(arrays)[0].shape[:2]
    chunk = min(chunk, t)
    one = jax.checkpoint(function, policy=jax.checkpoint_policies.nothing_saveable)
    if chunk == t:
        return one(arrays)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -t % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    pieces = jax.tree.map(split, arrays)
    sums = jax.eval_shape(function, jax.tree.map(lambda x: x[0], pieces))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    total, _ = jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, one(x)), None), zero, pieces)
    return total

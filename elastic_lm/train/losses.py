"""What the losses of training methods share: cross-entropy in chunks of the logits, and imitation."""

from collections.abc import Callable
from typing import Any, Literal

import chex
import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import vocab_logits
from elastic_lm.nn import sequence
from elastic_lm.nn.vocab_head import Head

LOSS_CHUNK = 256  # columns of logits in memory at once, unless a run says otherwise

Objective = Literal["kl", "argmax", "penalised"]
Metrics = dict[str, jax.Array]


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
    chex.assert_equal_shape(
        [targets_BT, weights_BT]
    )  # other weights would be broadcast, and sum to less or more
    found = token_losses(logits_BTV, targets_BT, confidence_weighted=confidence_weighted)
    return TokenSums(
        jnp.sum(found.loss * weights_BT),
        jax.lax.stop_gradient(jnp.sum(found.cross_entropy * weights_BT)),
        jnp.sum(weights_BT * found.correct),
        jnp.sum(weights_BT),
    )


@flax.struct.dataclass
class TokenLosses:
    """What a token's logits are worth, [B, T] each.

    Attributes:
      loss: token_weight * cross-entropy, in nats.
      cross_entropy: in nats.
      correct: bool, the arg max is the target.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    correct: jax.Array


def token_losses(
    logits_BTV: jax.Array, targets_BT: jax.Array, *, confidence_weighted: bool = False
) -> TokenLosses:
    """Next-token cross-entropy of every token.

    Args:
      logits_BTV: float32.
      targets_BT: int32 token that follows each input.
      confidence_weighted: see `chunked_cross_entropy`; static.

    Returns:
      TokenLosses.
    """
    chex.assert_equal_shape_prefix([logits_BTV, targets_BT], targets_BT.ndim)
    normaliser = jax.nn.logsumexp(logits_BTV, axis=-1)
    target = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    entropy = normaliser - target

    # Held fixed: a weight that learned could lower the loss by being unsure of everything.
    top = jnp.max(logits_BTV, axis=-1)
    confidence = jnp.exp(jax.lax.stop_gradient(top - normaliser)) if confidence_weighted else 1.0
    return TokenLosses(entropy * confidence, entropy, target >= top)


def chunked_cross_entropy(
    config: ModelConfig,
    features_BTD: jax.Array,
    head: Head,
    batch: Batch,
    *,
    temperature: float = 1.0,
    confidence_weighted: bool = False,
    chunk: int = LOSS_CHUNK,
) -> TokenSums:
    """Next-token cross-entropy that never holds more than `chunk` columns of logits.

    Logits are recomputed in the backward pass, so memory is B * chunk * V whatever T and the number
    of exits are. Chunks run along T, so a batch sharded over rows stays sharded.

    Args:
      config: static; its final softcap is applied.
      features_BTD: input of the vocabulary head.
      head: vocabulary head.
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
        logits = vocab_logits(config, features, head, temperature)
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
    leaves = jax.tree.leaves(arrays)
    chex.assert_equal_shape_prefix(leaves, 2)
    t = leaves[0].shape[1]
    chunk = min(_whole(chunk), t)
    one = jax.checkpoint(function, policy=jax.checkpoint_policies.nothing_saveable)
    if chunk == t:
        return one(arrays)

    pieces = jax.tree.map(lambda x: sequence.pieces(x, chunk), arrays)
    sums = jax.eval_shape(function, jax.tree.map(lambda x: x[0], pieces))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    total, _ = jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, one(x)), None), zero, pieces)
    return total


def eagerly(function: Callable[[Any, Any], tuple[jax.Array, Any]]) -> Callable[[Any, Any], Any]:
    """The same function, whose gradient is computed along with its value: nothing large waits for it.

    Args:
      function: from (what has a gradient, what has none) to (scalar, a tree without a gradient).

    Returns:
      A function of the same arguments and results, differentiable once in its first argument. Where nobody
      asks for a gradient, none is computed.
    """
    return _with_slopes(function, jax.value_and_grad(function, has_aux=True))


def losses_over_chunks(
    function: Callable[[Any, Any], tuple[jax.Array, Any]],
    learned: tuple[Any, Any],
    given: tuple[Any, Any],
    chunk: int,
) -> tuple[jax.Array, Any]:
    """Sums a loss over pieces of columns, and differentiates every piece as soon as it is computed.

    `sum_over_chunks` computes every piece again in its backward pass. Here each product with the vocabulary
    is computed once, because the gradient of a sum of losses does not have to wait for the other pieces.

    Args:
      function: from the pairs `learned` and `given`, with `chunk` columns of their second parts, to a scalar
        loss and a tree of [B, chunk, ...] numbers that have no gradient; static.
      learned: (parameters, a tree of [B, T, ...] arrays), which have gradients.
      given: (a tree, a tree of [B, T, ...] arrays), which have none. Columns that fill up the last piece are
        all zeros, weights too.
      chunk: columns of T per piece; static.

    Returns:
      (sum of the losses, a tree of [B, T, ...] numbers).
    """
    length = jax.tree.leaves(given[1])[0].shape[1]
    chunk = min(_whole(chunk), length)
    if chunk == length:
        return eagerly(function)(learned, given)

    def pieces(tree: Any) -> Any:
        return jax.tree.map(lambda x: sequence.pieces(x, chunk), tree)

    def whole(tree: Any) -> Any:
        return jax.tree.map(lambda x: sequence.joined(x, length), tree)

    def value(learned: tuple[Any, Any], given: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        def step(total: jax.Array, xs: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            loss, tokens = function((learned[0], xs[0]), (given[0], xs[1]))
            return total + loss, tokens

        zero = jnp.zeros((), jnp.float32)
        total, tokens = jax.lax.scan(step, zero, (pieces(learned[1]), pieces(given[1])))
        return total, whole(tokens)

    slope_of = jax.value_and_grad(function, has_aux=True)

    def slopes(learned: tuple[Any, Any], given: tuple[Any, Any]) -> tuple[tuple[jax.Array, Any], Any]:
        def step(sums: tuple[jax.Array, Any], xs: tuple[Any, Any]) -> tuple[Any, Any]:
            (loss, tokens), (shared, own) = slope_of((learned[0], xs[0]), (given[0], xs[1]))
            return jax.tree.map(jnp.add, sums, (loss, shared)), (tokens, own)

        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, learned[0])
        (total, shared), (tokens, own) = jax.lax.scan(step, zero, (pieces(learned[1]), pieces(given[1])))
        return (total, whole(tokens)), (shared, whole(own))

    return _with_slopes(value, slopes)(learned, given)


def _with_slopes(
    value: Callable[[Any, Any], tuple[jax.Array, Any]],
    slopes: Callable[[Any, Any], tuple[tuple[jax.Array, Any], Any]],
) -> Callable[[Any, Any], Any]:
    """A function, and what gives its value and its gradient together, as one differentiable function."""
    run = jax.custom_vjp(value)

    def backward(slope: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, None]:
        return jax.tree.map(lambda leaf: cotangents[0].astype(leaf.dtype) * leaf, slope), None

    run.defvjp(slopes, backward)
    return run


def _whole(chunk: int) -> int:
    """Columns of a piece, as many of every device that divides them."""
    return max(chunk // sequence.parts(), 1) * sequence.parts()


def imitation_loss(
    objective: Objective, teacher_V: jax.Array, student_V: jax.Array, top_k: int = 0, alpha: float = 0.9
) -> jax.Array:
    """L of every token, as written at the top of `depth.self_supervised`.

    Args:
      objective: which; static.
      teacher_V: [..., V] float32 logits of the full model, held fixed.
      student_V: [..., V] float32 logits of the exit.
      top_k: kl: K, 0 = all tokens; static.
      alpha: penalised: share of imitation; static.

    Returns:
      [...] float32, in nats.
    """
    chex.assert_equal_shape([teacher_V, student_V])  # one of a single row would be compared with every row
    if objective == "kl":
        if top_k:
            teacher_V, ids = jax.lax.top_k(teacher_V, min(top_k, teacher_V.shape[-1]))
            student_V = jnp.take_along_axis(student_V, ids, axis=-1)
        p, q = jax.nn.log_softmax(teacher_V), jax.nn.log_softmax(student_V)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    log_q = jax.nn.log_softmax(student_V)
    y = jnp.argmax(teacher_V, axis=-1)
    imitation = -jnp.take_along_axis(log_q, y[..., None], axis=-1)[..., 0]
    if objective == "argmax":
        return imitation

    # Where the exit errs, ln V - H(q): how sure it is of its error.
    wrong = jnp.argmax(student_V, axis=-1) != y
    confidence = jnp.log(student_V.shape[-1]) + jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
    return alpha * imitation + (1.0 - alpha) * wrong * confidence

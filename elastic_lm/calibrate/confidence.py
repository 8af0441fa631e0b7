"""How sure an exit is of its token: one float32 number in [0, 1] per token, higher is surer.

With p = softmax(logits) and p1 >= p2 its two largest entries:

    max_prob = p1        margin = p1 - p2        entropy = 1 - H(p) / ln V

An exit is taken when its confidence is *at least* its threshold: ties exit, a threshold of 0 always
exits, a threshold above 1 never does.
"""

import jax
import jax.numpy as jnp

METRICS = ("max_prob", "margin", "entropy")


def max_prob(logits: jax.Array) -> jax.Array:
    """Largest probability (EE-LLM)."""
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


def margin(logits: jax.Array) -> jax.Array:
    """Difference of the two largest probabilities (CALM)."""
    first = jnp.argmax(logits, axis=-1, keepdims=True)
    top = jnp.take_along_axis(logits, first, axis=-1)[..., 0]
    others = jnp.arange(logits.shape[-1]) != first
    second = jnp.max(logits, axis=-1, where=others, initial=-jnp.inf)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(top - normaliser) - jnp.exp(second - normaliser)


def entropy(logits: jax.Array) -> jax.Array:
    """One minus the entropy relative to that of the uniform distribution."""
    nats = jnp.sum(jax.scipy.special.entr(jax.nn.softmax(logits, axis=-1)), axis=-1)
    return jnp.clip(1.0 - nats / jnp.log(logits.shape[-1]), 0.0, 1.0)


FUNCTIONS = (max_prob, margin, entropy)


def metric_index(metric: str) -> int:
    """Position of `metric` in `METRICS`.

    Raises:
      ValueError: the metric does not exist.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: must be one of {', '.join(METRICS)}")
    return METRICS.index(metric)


def confidence(metric: str, logits: jax.Array) -> jax.Array:
    """Confidence of each token.

    Args:
      metric: one of `METRICS`; static.
      logits: [..., V] of any float dtype.

    Returns:
      [...] float32 in [0, 1].

    Raises:
      ValueError: the metric does not exist.
    """
    return FUNCTIONS[metric_index(metric)](logits.astype(jnp.float32))


def confidence_by_index(index: jax.Array, logits: jax.Array) -> jax.Array:
    """`confidence` with the metric as a traced value, so that changing it compiles nothing.

    Args:
      index: int32 scalar, position in `METRICS`.
      logits: [..., V] of any float dtype.

    Returns:
      [...] float32 in [0, 1].
    """
    return jax.lax.switch(index, FUNCTIONS, logits.astype(jnp.float32))

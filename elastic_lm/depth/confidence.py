"""How sure an exit is of its token: one float32 number in [0, 1] per token, higher is surer.

With z the exit's logits, z1 >= z2 the two largest, p = softmax(z) with p1 >= p2, V the vocabulary's
size, h_l the state after the exit's layer and g the probability that the exit's gate gives:

    max_prob = p1        margin = p1 - p2        entropy = 1 - H(p) / ln V
    logit_margin = m / (1 + m),  m = z1 - z2
    energy = (1 + e / (16 + |e|)) / 2,  e = logsumexp(z)
    cosine = (1 + cos(h_l, h_{l-1})) / 2         learned = g

The first five read the logits; `cosine` and `learned` are known before the vocabulary head is read.
Both squashings are softsigns, because a sigmoid is 1 in float32 from logits of about 17 on.

An exit is taken when its confidence is *at least* its threshold: ties exit, a threshold of 0 always
exits, a threshold above 1 never does.

Papers: EE-LLM, arXiv 2312.04916 (max_prob); CALM, arXiv 2207.07061 (margin, cosine = its "state",
learned = its "meta"); self-supervised early exits, arXiv 2407.21082 (entropy, logit_margin).
"""

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.exit_policy import DEFAULT_METRIC as DEFAULT_METRIC
from elastic_lm.config.exit_policy import LOGIT_METRICS, METRICS

ENERGY_SCALE = 16.0  # energies around this size are told apart best
LARGEST = float(jnp.finfo(jnp.float32).max)


@flax.struct.dataclass
class Evidence:
    """What an exit knows without its logits; leading dimensions as those of the logits without V.

    Attributes:
      cosine: [...] float32 in [0, 1], see `state_similarity`.
      learned: [...] float32 in [0, 1], see `Decoder.exit_gate`.
    """

    cosine: jax.Array
    learned: jax.Array


def state_similarity(hidden: jax.Array, entering: jax.Array) -> jax.Array:
    """How little a layer turned its input: cosine similarity, mapped from [-1, 1] to [0, 1].

    Args:
      hidden: [..., D] output of the layer, h_l, of any float dtype.
      entering: [..., D] input of the layer, h_{l-1}.

    Returns:
      [...] float32 in [0, 1].
    """
    hidden, entering = hidden.astype(jnp.float32), entering.astype(jnp.float32)
    norms = jnp.linalg.norm(hidden, axis=-1) * jnp.linalg.norm(entering, axis=-1)
    cosine = jnp.sum(hidden * entering, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
    return jnp.clip(0.5 + 0.5 * cosine, 0.0, 1.0)


def max_prob(logits: jax.Array) -> jax.Array:
    """Largest probability (EE-LLM)."""
    return jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))


def margin(logits: jax.Array) -> jax.Array:
    """Difference of the two largest probabilities (CALM)."""
    top, second = _two_largest(logits)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(top - normaliser) - jnp.exp(second - normaliser)


def entropy(logits: jax.Array) -> jax.Array:
    """One minus the entropy relative to that of the uniform distribution."""
    nats = jnp.sum(jax.scipy.special.entr(jax.nn.softmax(logits, axis=-1)), axis=-1)
    return jnp.clip(1.0 - nats / jnp.log(logits.shape[-1]), 0.0, 1.0)


def logit_margin(logits: jax.Array) -> jax.Array:
    """Difference of the two largest logits, squashed; unlike `margin` it does not saturate."""
    top, second = _two_largest(logits)
    difference = jnp.minimum(top - second, LARGEST)
    return difference / (1.0 + difference)


def energy(logits: jax.Array) -> jax.Array:
    """Log of the sum of exponentials, squashed; the only metric that an offset of all logits moves."""
    total = jnp.clip(jax.nn.logsumexp(logits, axis=-1), -LARGEST, LARGEST)
    return 0.5 + 0.5 * total / (ENERGY_SCALE + jnp.abs(total))


def _two_largest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    first = jnp.argmax(logits, axis=-1, keepdims=True)
    top = jnp.take_along_axis(logits, first, axis=-1)[..., 0]
    others = jnp.arange(logits.shape[-1]) != first
    return top, jnp.max(logits, axis=-1, where=others, initial=-jnp.inf)


FUNCTIONS = (max_prob, margin, entropy, logit_margin, energy)  # of LOGIT_METRICS


def metric_index(metric: str) -> int:
    """Position of `metric` in `METRICS`.

    Raises:
      ValueError: the metric does not exist.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: must be one of {', '.join(METRICS)}")
    return METRICS.index(metric)


def confidence(metric: str, logits: jax.Array) -> jax.Array:
    """Confidence of each token by a metric of its logits.

    Args:
      metric: one of `METRICS` that reads logits; static.
      logits: [..., V] of any float dtype.

    Returns:
      [...] float32 in [0, 1].

    Raises:
      ValueError: the metric does not exist, or does not read logits.
    """
    index = metric_index(metric)
    if metric not in LOGIT_METRICS:
        raise ValueError(
            f"metric={metric!r}: is not a function of logits; use confidence_by_index with an Evidence, or "
            f"one of {', '.join(LOGIT_METRICS)}"
        )
    return FUNCTIONS[index](logits.astype(jnp.float32))


def confidence_by_index(index: jax.Array, logits: jax.Array, state: Evidence | None = None) -> jax.Array:
    """Confidence of each token with the metric as a traced value, so that changing it compiles nothing.

    Args:
      index: int32 scalar, position in `METRICS`.
      logits: [..., V] of any float dtype.
      state: what `cosine` and `learned` return; None = zeros, which no threshold above 0 lets exit.

    Returns:
      [...] float32 in [0, 1].
    """
    if state is None:
        nothing = jnp.zeros(logits.shape[:-1], jnp.float32)
        state = Evidence(nothing, nothing)

    def of_logits(function):
        return lambda logits, _: function(logits)

    given = (
        lambda _, state: state.cosine.astype(jnp.float32),
        lambda _, state: state.learned.astype(jnp.float32),
    )
    branches = (*(of_logits(function) for function in FUNCTIONS), *given)
    return jax.lax.switch(index, branches, logits.astype(jnp.float32), state)


NEVER_EXITS = 2.0  # a threshold that no confidence reaches

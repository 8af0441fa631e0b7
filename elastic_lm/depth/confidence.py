"""How sure an exit is of its token: one float32 number in [0, 1] per token, higher is surer.

With z the exit's logits, z1 >= z2 the two largest, p = softmax(z) with p1 >= p2, V the vocabulary's
size, h_l the state after the exit's layer and g the probability that the exit's gate gives:

    max_prob = p1        margin = p1 - p2        entropy = 1 - H(p) / ln V
    logit_margin = m / (1 + m),  m = z1 - z2
    energy = (1 + e / (16 + |e|)) / 2,  e = logsumexp(z)
    cosine = (1 + cos(h_l, h_{l-1})) / 2         learned = g

The first five read the logits. `cosine` and `learned` are known before the vocabulary head is read.
`logit_margin` and `energy` are squashed by softsigns, because a sigmoid is 1 in float32 from about 17 on.

An exit is taken when its confidence is *at least* its threshold: ties exit, a threshold of 0 always
exits, a threshold above 1 never does.

A new metric is a name in `config.exit_policy` and a function in `LOGIT_FUNCTIONS` or `STATE_FUNCTIONS` below.

Papers: EE-LLM, arXiv 2312.04916 (max_prob); CALM, arXiv 2207.07061 (margin, cosine = its "state",
learned = its "meta"); self-supervised early exits, arXiv 2407.21082 (entropy, logit_margin).
"""

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.exit_policy import DEFAULT_METRIC as DEFAULT_METRIC
from elastic_lm.config.exit_policy import GATE_METRIC, LOGIT_METRICS, METRICS, STATE_METRICS

NEVER_EXITS = 2.0  # a threshold that no confidence reaches
ENERGY_SCALE = 16.0  # energies around this size are told apart best
LARGEST = float(jnp.finfo(jnp.float32).max)


@flax.struct.dataclass
class Evidence:
    """What is known about a token before the exit's logits are; leading dimensions are those of the logits.

    Attributes:
      state: [...] float32 in [0, 1], from `state_confidence`.
      gate: [...] float32 in [0, 1], from `Decoder.exit_gate`.
    """

    state: jax.Array
    gate: jax.Array


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
    metric_index(metric)
    if metric not in LOGIT_METRICS:
        raise ValueError(
            f"metric={metric!r}: is not a function of logits; use confidence_by_index with an Evidence, or "
            f"one of {', '.join(LOGIT_METRICS)}"
        )
    return LOGIT_FUNCTIONS[metric](logits.astype(jnp.float32))


def confidence_by_index(index: jax.Array, logits: jax.Array, evidence: Evidence | None = None) -> jax.Array:
    """Confidence of each token, with the metric as a traced value.

    The metrics are branches of one `switch`, so that changing the metric compiles nothing and only the one in
    use is computed.

    Args:
      index: int32 scalar, position in `METRICS`; traced.
      logits: [..., V] of any float dtype.
      evidence: what metrics that read no logits return; None = zeros, with which no threshold above 0 exits.

    Returns:
      [...] float32 in [0, 1].
    """
    if evidence is None:
        nothing = jnp.zeros(logits.shape[:-1], jnp.float32)
        evidence = Evidence(state=nothing, gate=nothing)

    def of_logits(name: str):
        return lambda logits, _: LOGIT_FUNCTIONS[name](logits)

    branches = [
        *(of_logits(name) for name in LOGIT_METRICS),
        *[lambda _, evidence: evidence.state.astype(jnp.float32)] * len(STATE_METRICS),
        lambda _, evidence: evidence.gate.astype(jnp.float32),
    ]
    return jax.lax.switch(index, branches, logits.astype(jnp.float32), evidence)


def confidence_without_logits(index: jax.Array, evidence: Evidence) -> jax.Array:
    """Confidence of each token by a metric that reads no logits; not meaningful for the others.

    Args:
      index: int32 scalar, position in `METRICS`; traced.
      evidence: [...] what is known of each token.

    Returns:
      [...] float32 in [0, 1].
    """
    return jnp.where(reads_gate(index), evidence.gate, evidence.state)


def reads_logits(index: jax.Array) -> jax.Array:
    """Whether the metric at a position in `METRICS` reads logits: bool scalar."""
    return index < len(LOGIT_METRICS)


def reads_states(index: jax.Array) -> jax.Array:
    """Whether the metric at a position in `METRICS` reads states: bool scalar."""
    first = len(LOGIT_METRICS)
    return (index >= first) & (index < first + len(STATE_METRICS))


def reads_gate(index: jax.Array) -> jax.Array:
    """Whether the metric at a position in `METRICS` reads the exit's gate: bool scalar."""
    return index == METRICS.index(GATE_METRIC)


def state_confidence(index: jax.Array, hidden: jax.Array, entering: jax.Array) -> jax.Array:
    """Confidence of each token by a metric of states; not meaningful for metrics that read none.

    Args:
      index: int32 scalar, position in `METRICS`; traced.
      hidden: [..., D] output of the exit's layer, h_l, of any float dtype.
      entering: [..., D] input of that layer, h_{l-1}.

    Returns:
      [...] float32 in [0, 1].
    """
    functions = [STATE_FUNCTIONS[name] for name in STATE_METRICS]
    return jax.lax.switch(index - len(LOGIT_METRICS), functions, hidden, entering)


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


def state_similarity(hidden: jax.Array, entering: jax.Array) -> jax.Array:
    """How little a layer turned its input: cosine similarity, mapped from [-1, 1] to [0, 1] (CALM).

    Args:
      hidden: [..., D] output of the layer, h_l, of any float dtype.
      entering: [..., D] input of the layer, h_{l-1}.

    Returns:
      [...] float32 in [0, 1]; 1/2 where a state is zero.
    """
    hidden, entering = hidden.astype(jnp.float32), entering.astype(jnp.float32)
    norms = jnp.linalg.norm(hidden, axis=-1) * jnp.linalg.norm(entering, axis=-1)
    cosine = jnp.sum(hidden * entering, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
    return jnp.clip(0.5 + 0.5 * cosine, 0.0, 1.0)


def _two_largest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    first = jnp.argmax(logits, axis=-1, keepdims=True)
    top = jnp.take_along_axis(logits, first, axis=-1)[..., 0]
    others = jnp.arange(logits.shape[-1]) != first
    return top, jnp.max(logits, axis=-1, where=others, initial=-jnp.inf)


LOGIT_FUNCTIONS = {
    "max_prob": max_prob,
    "margin": margin,
    "entropy": entropy,
    "logit_margin": logit_margin,
    "energy": energy,
}
STATE_FUNCTIONS = {"cosine": state_similarity}

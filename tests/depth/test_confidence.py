import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.exit_policy import STATE_METRICS
from elastic_lm.depth.confidence import (
    LOGIT_FUNCTIONS,
    LOGIT_METRICS,
    METRICS,
    STATE_FUNCTIONS,
    Evidence,
    confidence,
    confidence_by_index,
    confidence_without_logits,
    reads_gate,
    reads_logits,
    reads_states,
    state_confidence,
    state_similarity,
)

LOGITS = jnp.array([2.0, 1.0, 0.0])


def test_closed_forms():
    p = np.exp([2.0, 1.0, 0.0]) / np.exp([2.0, 1.0, 0.0]).sum()
    np.testing.assert_allclose(confidence("max_prob", LOGITS), 0.6652, atol=5e-5)
    np.testing.assert_allclose(confidence("margin", LOGITS), 0.4205, atol=5e-5)
    expected = 1 + (p * np.log(p)).sum() / np.log(3)
    np.testing.assert_allclose(confidence("entropy", LOGITS), expected, rtol=1e-5)
    np.testing.assert_allclose(confidence("logit_margin", LOGITS), 1 / 2, rtol=1e-6)
    total = np.log(np.exp([2.0, 1.0, 0.0]).sum())  # 2.4076
    np.testing.assert_allclose(confidence("energy", LOGITS), 0.5 + 0.5 * total / (16 + total), rtol=1e-6)


def test_order_of_metrics_is_part_of_the_interface():
    assert METRICS[:3] == ("max_prob", "margin", "entropy")
    assert METRICS[-2:] == ("cosine", "learned")
    # Every name has its function, and every function a name that the command line shows.
    assert tuple(LOGIT_FUNCTIONS) == LOGIT_METRICS
    assert tuple(STATE_FUNCTIONS) == STATE_METRICS


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_reads_one_thing(metric):
    index = jnp.int32(METRICS.index(metric))
    reads = [bool(reads(index)) for reads in (reads_logits, reads_states, reads_gate)]
    assert reads == [metric in LOGIT_METRICS, metric == "cosine", metric == "learned"]


@pytest.mark.parametrize("metric", ["max_prob", "margin", "entropy"])
def test_range(metric):
    # Certain, uniform, and huge logits all stay in [0, 1].
    rows = jnp.array([[1e4, 0.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0], [-jnp.inf, 0.0, -jnp.inf, -jnp.inf]])
    values = np.asarray(confidence(metric, rows))
    uniform = 0.25 if metric == "max_prob" else 0.0
    np.testing.assert_allclose(values, [1.0, uniform, 1.0], atol=1e-6)
    assert values.max() <= 1.0
    assert values.min() >= 0.0


@pytest.mark.parametrize("metric", ["logit_margin", "energy"])
def test_squashed_metrics_stay_in_range_and_finite(metric):
    rows = jnp.array([[1e38, 0.0, 0.0], [-1e38, -1e38, -1e38], [-jnp.inf, 0.0, -jnp.inf], [2.0, 2.0, 2.0]])
    values = np.asarray(confidence(metric, rows))
    assert np.isfinite(values).all()
    assert values.max() <= 1.0
    assert values.min() >= 0.0


@pytest.mark.parametrize("metric", ["margin", "logit_margin"])
def test_tied_top_tokens_have_no_margin(metric):
    assert float(confidence(metric, jnp.array([3.0, 3.0, 0.0]))) == 0.0


@pytest.mark.parametrize("step", [0.0, 1.0, 20.0, 100.0, 400.0])
def test_squashing_is_monotone_where_a_sigmoid_is_one(step):
    differences = jnp.linspace(0, 1.0, 11) + step
    two = jnp.stack([differences, jnp.zeros_like(differences)], axis=-1)
    assert (np.diff(confidence("logit_margin", two)) > 0).all()
    one = differences[:, None]  # the energy of a single logit is that logit
    assert (np.diff(confidence("energy", one)) > 0).all()
    assert (np.diff(confidence("energy", -one)) < 0).all()
    assert float(confidence("energy", jnp.array([20.0]))) < float(confidence("energy", jnp.array([20.1])))


def test_similarity_of_states():
    hidden = jnp.array([[1.0, 0.0], [1.0, 0.0], [3.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    entering = jnp.array([[0.0, 2.0], [-5.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    expected = [0.5, 0.0, 1.0, 0.5 + 0.5**1.5, 0.5]
    np.testing.assert_allclose(state_similarity(hidden, entering), expected, atol=1e-6)
    cosine = jnp.int32(METRICS.index("cosine"))
    np.testing.assert_array_equal(
        state_confidence(cosine, hidden, entering), state_similarity(hidden, entering)
    )
    low = state_similarity(hidden.astype(jnp.bfloat16), entering.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32


def test_what_is_known_without_logits_is_returned_as_it_is():
    logits = jnp.zeros((2, 3, 7))
    state = Evidence(jnp.full((2, 3), 0.25), jnp.full((2, 3), 0.75))
    for metric, value in (("cosine", 0.25), ("learned", 0.75)):
        index = jnp.int32(METRICS.index(metric))
        np.testing.assert_array_equal(confidence_by_index(index, logits, state), np.full((2, 3), value))
        np.testing.assert_array_equal(confidence_by_index(index, logits), np.zeros((2, 3)))
        np.testing.assert_array_equal(confidence_without_logits(index, state), np.full((2, 3), value))
        with pytest.raises(ValueError, match=rf"metric='{metric}': is not a function of logits"):
            confidence(metric, logits)


@pytest.mark.parametrize("index", range(len(LOGIT_METRICS)))
def test_traced_index_matches_name(index):
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 5, 11))
    traced = jax.jit(confidence_by_index)(jnp.int32(index), logits)
    np.testing.assert_allclose(traced, confidence(METRICS[index], logits), rtol=1e-6)
    assert traced.shape == (2, 5)
    assert traced.dtype == jnp.float32


def test_low_precision_logits_give_float32():
    assert confidence("max_prob", LOGITS.astype(jnp.bfloat16)).dtype == jnp.float32


def test_unknown_metric():
    with pytest.raises(ValueError, match=r"metric='surprise'.*max_prob, margin, entropy"):
        confidence("surprise", LOGITS)

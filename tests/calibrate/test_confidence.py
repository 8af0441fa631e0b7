import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.calibrate.confidence import METRICS, confidence, confidence_by_index

LOGITS = jnp.array([2.0, 1.0, 0.0])


def test_closed_forms():
    p = np.exp([2.0, 1.0, 0.0]) / np.exp([2.0, 1.0, 0.0]).sum()
    np.testing.assert_allclose(confidence("max_prob", LOGITS), 0.6652, atol=5e-5)
    np.testing.assert_allclose(confidence("margin", LOGITS), 0.4205, atol=5e-5)
    expected = 1 + (p * np.log(p)).sum() / np.log(3)
    np.testing.assert_allclose(confidence("entropy", LOGITS), expected, rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_range(metric):
    # Certain, uniform, and huge logits all stay in [0, 1].
    rows = jnp.array([[1e4, 0.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0], [-jnp.inf, 0.0, -jnp.inf, -jnp.inf]])
    values = np.asarray(confidence(metric, rows))
    uniform = 0.25 if metric == "max_prob" else 0.0
    np.testing.assert_allclose(values, [1.0, uniform, 1.0], atol=1e-6)
    assert values.max() <= 1.0
    assert values.min() >= 0.0


def test_tied_top_tokens_have_no_margin():
    assert float(confidence("margin", jnp.array([3.0, 3.0, 0.0]))) == 0.0


@pytest.mark.parametrize("index", range(len(METRICS)))
def test_traced_index_matches_name(index):
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 5, 11))
    traced = jax.jit(confidence_by_index)(jnp.int32(index), logits)
    np.testing.assert_allclose(traced, confidence(METRICS[index], logits), rtol=1e-6)
    assert traced.shape == (2, 5)
    assert traced.dtype == jnp.float32


def test_low_precision_logits_give_float32():
    assert confidence("max_prob", LOGITS.astype(jnp.bfloat16)).dtype == jnp.float32


def test_unknown_metric():
    with pytest.raises(ValueError, match=r"metric='energy'.*max_prob, margin, entropy"):
        confidence("energy", LOGITS)

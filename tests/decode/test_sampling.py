"""Drawing tokens: filters against their definitions, draws against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.decode.sampling import keep, sample
from elastic_lm.decode.settings import Settings

LOGITS = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.07, 0.03]]))


def kept(**settings):
    return np.asarray(keep(LOGITS, Settings(temperature=1.0, **settings).arrays(1)))[0].tolist()


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"top_k": 99}, 5),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.51}, 2),
        ({"top_p": 0.9}, 3),
        ({"top_p": 0.0}, 1),
        ({"min_p": 0.29}, 3),
        ({"min_p": 1.0}, 1),
        ({"top_k": 3, "top_p": 0.8}, 2),
    ],
)
def test_filters_keep_the_likeliest(settings, count):
    assert kept(**settings) == [True] * count + [False] * (5 - count)


def test_top_p_of_one_keeps_the_far_tail():
    logits = jax.random.normal(jax.random.key(0), (3, 32000)) * 3.0  # sums of probabilities round up to 1
    assert np.asarray(keep(logits, Settings(temperature=1.0).arrays(3))).all()


@pytest.mark.parametrize("seed", [3, np.int64(3), [3, 4]])
def test_rows_draw_with_seeds_of_their_own(seed):
    assert Settings(seed=seed).arrays(2).seed.tolist() == [3, 4]


def draw(n, logits=LOGITS, tokens=(), **settings):
    how = Settings(seed=list(range(n)), **settings).arrays(n)
    rows = jnp.broadcast_to(logits, (n, logits.shape[-1]))
    row = np.full(9, 1)  # positions from 7 on do not count as present
    row[:7] = [*tokens, *[4] * (7 - len(tokens))]
    present = jnp.broadcast_to(jnp.asarray(row), (n, 9))
    return np.asarray(jax.jit(sample)(rows, present, jnp.full((n,), 7), how))


def test_zero_temperature_is_greedy():
    assert set(draw(50).tolist()) == {0}


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 3)])
def test_draws_follow_the_distribution(temperature, top_k):
    n = 20_000
    counts = np.bincount(draw(n, temperature=temperature, top_k=top_k), minlength=5)
    p = np.exp(np.asarray(LOGITS[0], np.float64) / temperature)
    p[top_k or 5 :] = 0
    p /= p.sum()
    assert counts[p == 0].sum() == 0
    chi2 = ((counts - n * p)[p > 0] ** 2 / (n * p[p > 0])).sum()
    assert chi2 < 18.5  # 99.9 % quantile with 4 degrees of freedom


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = jnp.asarray([[2.0, 1.5, -1.0, -9.0, -9.0]])
    assert draw(1, logits, (0,), repetition_penalty=1.5).tolist() == [1]
    both_negative = jnp.asarray([[-1.0, -1.4, -9.0, -9.0, -9.0]])
    assert draw(1, both_negative, (0,), repetition_penalty=1.5).tolist() == [1]


def test_rows_draw_by_their_own_seed(model, prompts):
    sampler = model.sampler((0.5, 0.5))
    batch = sampler.sample([prompts[1]] * 3, 16, temperature=1.0, seed=5)
    single = [sampler.sample(prompts[1], 16, temperature=1.0, seed=5 + i) for i in range(3)]
    assert [b.tokens for b in batch] == [s.tokens for s in single]
    assert batch[0].tokens != batch[1].tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"top_p": 1.5}, "top_p=1.5: must be between 0.0 and 1.0"),
        ({"temperature": [0.1, 0.2]}, "temperature has 2 entries"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_values_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings).arrays(1)

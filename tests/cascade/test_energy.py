"""Energies by hand, their sign and their trap: constants that no probability sees."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.cascade.energy import energy_score, keeps, pool
from elastic_lm.cascade.scores import (
    Scoring,
    logit_scores,
    pooled_scores,
    random_score,
    score_of,
)
from elastic_lm.config.cascade import KINDS, SCORES
from elastic_lm.decode.token_scores import free_energy


def test_energy_by_hand() -> None:
    # ln(e^0 + e^ln3) = ln 4; at T = 2: 2 ln(1 + 3^(1/2))
    logits = jnp.asarray([0.0, math.log(3.0)])
    np.testing.assert_allclose(free_energy(logits), -math.log(4.0), rtol=1e-6)
    np.testing.assert_allclose(free_energy(logits, 2.0), -2 * math.log(1 + math.sqrt(3)), rtol=1e-6)
    np.testing.assert_allclose(energy_score(logits, centre="mean"), math.log(4) - math.log(3) / 2, rtol=1e-6)


def test_energy_is_float32_and_does_not_overflow() -> None:
    score = energy_score(jnp.asarray([[300.0, 0.0], [-300.0, -400.0]], jnp.bfloat16))
    assert score.dtype == jnp.float32
    np.testing.assert_allclose(score, [300.0, -300.0])


def test_surer_records_score_higher_by_every_kind() -> None:
    scores = logit_scores(jnp.asarray([[4.0, 0.0, 0.0], [1.0, 0.9, 0.8]]))
    assert set(scores) == set(KINDS)
    for kind, (sure, unsure) in scores.items():
        assert sure > unsure, kind


def test_log_probability_is_energy_and_largest_logit() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)), jnp.float32)
    scores = logit_scores(logits)
    np.testing.assert_allclose(
        np.log(scores["max_prob"]), free_energy(logits) + jnp.max(logits, -1), rtol=1e-4, atol=1e-6
    )


def test_a_constant_moves_the_energy_alone_unless_centred() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)), jnp.float32)
    shift = jnp.arange(5.0)[:, None]  # another one for every record
    plain, moved = logit_scores(logits), logit_scores(logits + shift)
    np.testing.assert_allclose(moved["energy"], plain["energy"] + shift[:, 0], rtol=1e-5)
    for kind in set(KINDS) - {"energy"}:
        np.testing.assert_allclose(moved[kind], plain[kind], atol=2e-6)
    centred = Scoring(centre="mean")
    np.testing.assert_allclose(
        logit_scores(logits + shift, centred)["energy"], logit_scores(logits, centred)["energy"], atol=2e-6
    )


def test_pooling_reads_counted_tokens() -> None:
    scores = jnp.asarray([[1.0, 3.0, 100.0], [5.0, -1.0, 4.0], [1.0, 1.0, 1.0]])
    counted = jnp.asarray([[True, True, False], [True, True, True], [False] * 3])
    np.testing.assert_allclose(pool(scores, counted, "mean"), [2.0, 8 / 3, np.nan], rtol=1e-6)
    np.testing.assert_allclose(pool(scores, counted, "min"), [1.0, -1.0, np.nan])
    names = pooled_scores({"energy": scores}, counted, "prompt_")
    assert list(names) == ["prompt_energy", "prompt_energy_min"]
    assert set(names) <= set(SCORES)


def test_ties_stay_with_the_swift_and_nan_goes_to_the_super() -> None:
    assert keeps(np.asarray([1.31044, 1.3, np.nan]), 1.31044).tolist() == [True, False, False]


def test_random_scores_depend_on_seed_and_record_alone() -> None:
    scores = [random_score(0, i) for i in range(2000)]
    assert scores == [random_score(0, i) for i in range(2000)]
    assert len(set(scores)) == 2000
    assert abs(np.mean(scores) - 0.5) < 0.03
    assert random_score(1, 0) != scores[0]
    assert score_of({}, "random", 0, 3) == scores[3]
    with pytest.raises(ValueError, match=r"score='energy'.*max_prob"):
        score_of({"max_prob": 1.0}, "energy", 0, 3)


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("centre", "median")])
def test_scoring_refuses(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Scoring(**{field: value})

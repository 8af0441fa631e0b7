"""The sweep and its picks against brute force; what a guarantee says; the file of a rule."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from elastic_lm.cascade.guarantee import CascadeRisk, control, harm, ladder
from elastic_lm.cascade.rule import CascadeRule, fit_rule
from elastic_lm.cascade.scores import Scoring
from elastic_lm.cascade.sweep import (
    ALWAYS_SUPER,
    ALWAYS_SWIFT,
    Measurements,
    cheapest,
    like_super,
    most_accurate,
    sweep,
)


def drawn(n: int = 60, seed: int = 0, ties: bool = True, good: float = 0.9) -> Measurements:
    """Records whose Swift is right more often where its score is high."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n).round(1) if ties else rng.normal(size=n)
    swift = rng.random(n) < 1 / (1 + np.exp(-2 * scores))
    costs = [rng.uniform(*range_, n) for range_ in ((1, 2), (8, 12), (0, 3))]
    right = swift, rng.random(n) < good
    return Measurements.of(scores, *right, *costs)


def brute(measured: Measurements) -> list[tuple[float, float, float]]:
    """(share, accuracy, cost) of every threshold that is a score, or above all."""
    found = []
    for t in [*sorted(set(measured.scores.tolist())), np.inf]:
        passed_on = [not s >= t for s in measured.scores]
        answers = [b if r else a for r, a, b in zip(passed_on, measured.swift, measured.super_, strict=True)]
        columns = zip(passed_on, measured.cost_swift, measured.cost_super, measured.cost_kept, strict=True)
        costs = [c + (d if r else k) for r, c, d, k in columns]
        found.append((np.mean(passed_on), np.mean(answers), np.mean(costs)))
    return found


@pytest.mark.parametrize("ties", [True, False])
def test_sweep_is_every_threshold(ties: bool) -> None:
    measured = drawn(ties=ties)
    curve, expected = sweep(measured), np.asarray(brute(measured))
    np.testing.assert_allclose(np.c_[curve.share_super, curve.accuracy, curve.cost], expected, rtol=1e-12)
    assert (np.diff(curve.threshold) > 0).all()
    for i in range(len(curve)):  # thresholds do on the records what the curve says
        assert dataclasses.astuple(measured.at(curve.threshold[i])) == pytest.approx(
            dataclasses.astuple(curve.point(i))
        )
    assert (curve.threshold[0], curve.threshold[-1]) == (ALWAYS_SWIFT, ALWAYS_SUPER)
    assert curve.accuracy[0] == pytest.approx(curve.swift_accuracy)
    assert curve.accuracy[-1] == pytest.approx(curve.super_accuracy)
    points = curve.points(5)
    assert len(points) == 5
    assert points[0] == curve.point(0)
    assert points[-1] == curve.point(len(curve) - 1)


@pytest.mark.parametrize("seed", range(5))
def test_picks_are_the_best_there_are(seed: int) -> None:
    measured = drawn(seed=seed)
    curve, every = sweep(measured), brute(measured)
    for target in (0.5, 0.8, curve.super_accuracy):
        point = cheapest(curve, target)
        assert point.accuracy >= target - 1e-9
        assert point.cost == pytest.approx(min(c for _, a, c in every if a >= target - 1e-9))
    assert like_super(curve) == cheapest(curve, curve.super_accuracy)
    for budget in (curve.cost[0], 5.0, 100.0, None):
        point = most_accurate(curve, budget)
        within = [(a, -c) for _, a, c in every if budget is None or c <= budget + 1e-9]
        assert (point.accuracy, -point.cost) == pytest.approx(max(within))


def test_scores_that_are_nan_never_stay() -> None:
    measured = Measurements.of([np.nan, 1.0, 2.0], [1, 0, 1], [0, 1, 1], 1.0, 10.0)
    curve = sweep(measured)
    assert curve.share_super == pytest.approx([1 / 3, 2 / 3, 1])
    assert curve.accuracy == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert sweep(Measurements.of([np.nan], [1], [0], 1.0, 1.0)).share_super.tolist() == [1.0]


def test_out_of_reach_says_what_is_possible() -> None:
    curve = sweep(drawn())
    with pytest.raises(ValueError, match=r"target_accuracy=0.9999: no threshold.*Super alone"):
        cheapest(curve, 0.9999)
    with pytest.raises(ValueError, match=r"target_cost=0.1: the Swift alone costs"):
        most_accurate(curve, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": []}, "at least one"),
        ({"swift": [1, 0]}, "swift_correct.shape"),
        ({"super_": [1, 2, 0]}, "super_correct"),
        ({"cost_super": -1.0}, "cost_super"),
        ({"cost_swift": [1.0]}, "cost_swift.shape"),
        ({"scores": [1, 2, np.inf]}, "scores"),
    ],
)
def test_measurements_refuse(change: dict, message: str) -> None:
    given = {"scores": [1, 2, 3], "swift": [1, 0, 1], "super_": [1, 1, 1], "cost_swift": 1, "cost_super": 2}
    with pytest.raises(ValueError, match=message):
        Measurements.of(**{**given, **change})


def shifted(measured: Measurements, constant: float) -> Measurements:
    return dataclasses.replace(measured, scores=measured.scores + constant)


@pytest.mark.parametrize(
    "goal", [{"target_accuracy": 0.8}, {"target_cost": 6.0}, {"super_accuracy": True}, {"risk": 0.2}]
)
def test_models_that_differ_by_a_constant_decide_the_same(goal: dict) -> None:
    goal = {name: CascadeRisk(value) if name == "risk" else value for name, value in goal.items()}
    measured = drawn(n=400, ties=False)
    rule, other = fit_rule(measured, **goal), fit_rule(shifted(measured, 37.5), **goal)
    kept, others = measured.scores >= rule.threshold, measured.scores + 37.5 >= other.threshold
    assert 0 < kept.mean() < 1
    assert (kept == others).all()
    assert rule.measured is not None
    assert other.measured is not None
    assert dataclasses.astuple(rule.measured)[1:] == pytest.approx(dataclasses.astuple(other.measured)[1:])
    # the trap: one threshold for both
    assert ((measured.scores + 37.5 >= rule.threshold) != kept).any()


def test_harm_grows_with_what_is_kept_and_bounds_the_loss() -> None:
    measured = drawn(n=300)
    thresholds = ladder(measured, 0.2)
    harms = [harm(measured, t).mean() for t in thresholds]
    assert thresholds == sorted(thresholds, reverse=True)
    assert harms == sorted(harms)
    assert harms[-1] <= 0.2
    for t, suffered in zip(thresholds, harms, strict=True):
        assert measured.at(t).accuracy >= measured.super_.mean() - suffered - 1e-12
    below = [t for t in sweep(measured).threshold if t < thresholds[-1]]
    assert all(harm(measured, t).mean() > 0.2 for t in below)  # nothing less cautious was allowed


def test_guarantee_fails_as_seldom_as_it_says() -> None:
    population = drawn(n=200_000, seed=99, ties=False)
    draw, lost, achieved = np.random.default_rng(1), [], 0
    for seed in range(200):
        threshold, guarantee = control(
            population.take(draw.integers(0, len(population), 400)), CascadeRisk(0.1, 0.1), seed
        )
        achieved += guarantee.achieved
        lost.append(population.super_.mean() - population.at(threshold).accuracy)
    assert achieved > 100
    assert np.mean(np.asarray(lost) > 0.1) <= 0.1


def test_without_enough_records_every_record_goes_to_the_super() -> None:
    measured = drawn(n=40)
    rule = fit_rule(measured, risk=CascadeRisk(0.01))
    assert rule.threshold == ALWAYS_SUPER
    assert rule.guarantee is not None
    assert not rule.guarantee.achieved
    assert "not achievable" in rule.guarantee.statement
    assert rule.measured is not None
    assert rule.measured.share_super == 1.0


def test_fit_wants_one_goal() -> None:
    for goals in ({}, {"target_accuracy": 0.5, "super_accuracy": True}):
        with pytest.raises(ValueError, match="exactly one of"):
            fit_rule(drawn(), **goals)


def test_rule_survives_its_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "rules" / "rule.json"
    goal = {"risk": CascadeRisk(0.2), "score": "energy_min", "scoring": Scoring(2.0, "mean")}
    rule = fit_rule(drawn(300), **goal, models={"swift": "a", "super": "b"}, data="records")
    rule.save(file)
    loaded = CascadeRule.load(file)
    assert loaded == rule
    assert loaded.scoring == Scoring(2.0, "mean")
    assert loaded.provenance["models"] == {"swift": "a", "super": "b"}
    assert {"date", "versions", "data", "cost", "guarantee"} <= set(loaded.provenance)
    loaded.check(None)
    with pytest.raises(ValueError, match=r"swift.scoring.temperature=1.0: the rule was fitted with 2.0"):
        loaded.check(Scoring())
    CascadeRule(0.0, "max_prob", temperature=2.0).check(Scoring())  # reads no energy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format"),
        ({"threshold": None}, "threshold"),
        ({"treshold": 1.0}, "did you mean threshold"),
        ({"centre": "median"}, "centre='median'"),
        ({"curve": [{"threshold": 1}]}, "share_super"),
        ({"seed": -1}, "seed"),
    ],
)
def test_load_names_what_is_wrong(tmp_path: pathlib.Path, change: dict, message: str) -> None:
    file = tmp_path / "rule.json"
    CascadeRule(1.0).save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f"rule.json: not a usable cascade rule.*{message}"):
        CascadeRule.load(file)


def test_load_wants_a_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="cascade fit"):
        CascadeRule.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": "elastic')
    with pytest.raises(ValueError, match="not a usable cascade rule"):
        CascadeRule.load(tmp_path / "half.json")

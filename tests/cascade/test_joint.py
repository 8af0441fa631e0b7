"""Thresholds of several members: the search against brute force, the guarantee against a known truth."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from elastic_lm.cascade.guarantee import CascadeRisk
from elastic_lm.cascade.joint import JointMeasurements, candidates, grid_of
from elastic_lm.cascade.joint_rule import JointRule, control_jointly, fit_joint, load_rule, path
from elastic_lm.cascade.rule import CascadeRule, Stage, fit_rule
from elastic_lm.cascade.sweep import ALWAYS_SUPER, ALWAYS_SWIFT, Measurements, sweep


def drawn(n: int, k: int, seed: int = 0, *, places: int = 1, noise: float = 1.0) -> JointMeasurements:
    """Records of a difficulty, which larger members master more often, and scores that tell it with noise."""
    rng = np.random.default_rng(seed)
    easy = rng.normal(size=n)
    ability = np.linspace(0.0, 2.5, k)[:, None]
    right = rng.random((k, n)) < 1 / (1 + np.exp(-2 * (easy + ability)))
    scores = (easy + noise * rng.normal(size=(k - 1, n))).round(places)
    scores[0, rng.random(n) < 0.03] = np.nan
    costs = 4.0 ** np.arange(k)[:, None] * rng.uniform(0.9, 1.1, (k, n))
    return JointMeasurements.of(scores, right, costs, rng.uniform(0, 1, (k - 1, n)))


def brute(measured: JointMeasurements, thresholds: tuple[float, ...]) -> tuple[float, float, float]:
    """(accuracy, cost, harm) record by record."""
    rows = []
    for i in range(len(measured)):
        cost, member = 0.0, 0
        while True:
            cost += measured.costs[member, i]
            if member == measured.members - 1:
                break
            if measured.scores[member, i] >= thresholds[member]:
                cost += measured.kept[member, i]
                break
            member += 1
        quality, last = measured.qualities[member, i], measured.qualities[-1, i]
        rows.append((quality, cost, max(last - quality, 0.0)))
    return tuple(np.mean(rows, axis=0))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_grid_is_every_combination(k: int) -> None:
    measured = drawn(40, k, seed=k)
    grid = grid_of(measured, cells=6 ** (k - 1))
    assert grid.cost.shape == tuple(map(len, grid.thresholds))
    for cell, places in enumerate(itertools.product(*map(range, grid.cost.shape))):
        thresholds = grid.at(cell)
        expected = brute(measured, thresholds)
        found = grid.accuracy[places], grid.cost[places], grid.harm[places]
        assert found == pytest.approx(expected, abs=1e-12)
        point = measured.at(thresholds)
        assert (point.accuracy, point.cost) == pytest.approx(expected[:2])
        assert sum(point.shares) == pytest.approx(1.0)


def test_two_members_are_the_sweep() -> None:
    measured = drawn(60, 2)
    pair = Measurements.of(
        measured.scores[0], *measured.qualities, *measured.costs, cost_kept=measured.kept[0]
    )
    curve, grid = sweep(pair), grid_of(measured)
    np.testing.assert_array_equal(grid.thresholds[0], curve.threshold)
    np.testing.assert_allclose(grid.accuracy, curve.accuracy, atol=1e-12)
    np.testing.assert_allclose(grid.cost, curve.cost, atol=1e-12)
    for goal in ({"super_accuracy": True}, {"target_cost": 3.0}, {"target_accuracy": 0.75}):
        joint, own = fit_joint(measured, **goal), fit_rule(pair, **goal)
        assert joint.thresholds == (own.threshold,)
        assert joint.measured.cost == pytest.approx(own.measured.cost)


@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_that_reach_a_target_are_found(seed: int) -> None:
    measured = drawn(30, 3, seed)
    every = [np.unique(row[~np.isnan(row)]) for row in measured.scores]
    choices = itertools.product(*([*own, np.inf] for own in every))
    outcomes = [brute(measured, thresholds) for thresholds in choices]
    for target in (0.7, float(measured.qualities[-1].mean())):
        found = fit_joint(measured, target_accuracy=target).measured
        assert found.accuracy >= target - 1e-9
        assert found.cost == pytest.approx(min(c for a, c, _ in outcomes if a >= target - 1e-9))
    for budget in (3.0, 9.0, 30.0):
        found = fit_joint(measured, target_cost=budget).measured
        best = max((a, -c) for a, c, _ in outcomes if c <= budget + 1e-9)
        assert (found.accuracy, -found.cost) == pytest.approx(best)
    front = fit_joint(measured, super_accuracy=True).curve
    assert all(a.cost < b.cost and a.accuracy < b.accuracy for a, b in itertools.pairwise(front))


def test_thresholds_of_even_ranks() -> None:
    scores = np.concatenate([np.linspace(0, 1, 90), [1000.0] * 10, [np.nan]])
    few = candidates(scores, 12)
    assert (few[0], few[-1]) == (ALWAYS_SWIFT, ALWAYS_SUPER)
    assert 8 <= len(few) <= 12
    kept = [np.sum(scores >= t) for t in few]
    assert max(-np.diff(kept)) <= 2 * len(scores) / 10
    assert len(candidates(scores, 10**6)) == 91 - 1 + 2
    np.testing.assert_array_equal(candidates(np.asarray([np.nan]), 5), [ALWAYS_SWIFT, ALWAYS_SUPER])


def test_the_joint_guarantee_fails_as_seldom_as_it_says() -> None:
    """The expected loss is known: it is that of the population of which every sample is drawn."""
    population = drawn(10_000, 3, seed=9, places=2)
    harm, every = population.harm(), np.arange(len(population))
    stated, rng = CascadeRisk(loss=0.05, epsilon=0.2), np.random.default_rng(0)

    def fails(thresholds: tuple[float, ...]) -> bool:
        return harm[population.answered_by(thresholds), every].mean() > stated.loss

    failed, naive, achieved, costs, rounds = 0, 0, 0, [], 60
    for seed in range(rounds):
        sample = population.take(rng.integers(0, len(population), 600))
        thresholds, guarantee = control_jointly(sample, stated, seed)
        failed += fails(thresholds)
        naive += fails(path(sample, stated.loss)[-1])  # the same search, believed without a test
        achieved += guarantee.achieved
        costs.append(population.at(thresholds).cost)
    assert failed <= stated.epsilon * rounds
    assert naive > 2 * stated.epsilon * rounds
    assert achieved > rounds / 2  # the guarantee is not empty
    assert np.mean(costs) < 0.9 * population.at((ALWAYS_SUPER, ALWAYS_SUPER)).cost


def test_a_path_is_chosen_by_its_own_records_and_grows_bolder() -> None:
    measured = drawn(500, 3, places=3)
    steps = path(measured, 0.05)
    points = [measured.at(thresholds) for thresholds in steps]
    every = np.arange(len(measured))
    harms = [measured.harm()[measured.answered_by(t), every].mean() for t in steps]
    assert len(steps) > 3
    assert harms[-1] <= 0.05
    assert all(a.cost >= b.cost for a, b in itertools.pairwise(points))
    assert harms[0] <= 0.05 / 16 + 1e-12


def test_without_enough_records_every_record_goes_to_the_last_member() -> None:
    rule = fit_joint(drawn(30, 3), risk=CascadeRisk(loss=0.01))
    assert rule.thresholds == (ALWAYS_SUPER, ALWAYS_SUPER)
    assert not rule.guarantee.achieved
    assert "not achievable with these records" in rule.guarantee.statement


def test_rules_survive_their_files(tmp_path: pathlib.Path) -> None:
    rule = fit_joint(drawn(400, 3), risk=CascadeRisk(loss=0.2), scores=("margin", "logprob"), data="d")
    rule.save(tmp_path / "rule.json")
    assert JointRule.load(tmp_path / "rule.json") == rule
    assert load_rule(tmp_path / "rule.json") == rule
    CascadeRule(0.5).save(tmp_path / "two.json")
    assert load_rule(tmp_path / "two.json") == CascadeRule(0.5)
    with pytest.raises(ValueError, match=r'not a usable rule of several members .*"format" is not'):
        JointRule.load(tmp_path / "two.json")
    content = json.loads((tmp_path / "rule.json").read_text())
    content["stages"][1]["threshold"] = None
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"stages\[1\].threshold=None: must be of type float"):
        load_rule(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match="no such cascade rule"):
        load_rule(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qualities": [[1, 0]]}, "qualities: members=1: a cascade has at least 2"),
        ({"scores": [[1, 2]]}, "scores: members=1: give one entry for each of 2"),
        ({"costs": [1, 2, [3, 4, 5]]}, r"costs\[2\].shape=\(3,\): give one value per record \(2\)"),
        ({"costs": [1, 2, -3]}, "costs='a value': must be finite and at least 0"),
        ({"qualities": [[1, 0], [1, 2], [1, 1]]}, "must be qualities in"),
        ({"scores": [[1, 2], [1, np.inf]]}, "scores='inf': must be finite"),
        ({"scores": [[1, 2], 3]}, r"scores\[1\].shape=\(\)"),
        ({"qualities": [[1, 0], ["a", 1], [1, 1]]}, r"qualities\[1\]=\['a', 1\]: must be numbers"),
        (
            {"qualities": [[1, 1]] * 13, "scores": [[1, 2]] * 12, "costs": [1] * 13},
            "members=13: .* at most 12",
        ),
    ],
)
def test_measurements_refuse(change: dict, message: str) -> None:
    good = {"scores": [[1, 2], [3, 4]], "qualities": [[1, 0], [1, 1], [1, 1]], "costs": [1, 2, 3]}
    with pytest.raises(ValueError, match=message):
        JointMeasurements.of(**{**good, **change})


def test_a_score_of_minus_infinity_is_passed_on_by_every_threshold() -> None:
    scores = np.linspace(0, 1, 40)
    given = {"qualities": [[1] * 40] * 2, "costs": [1.0, 10.0]}
    rule = fit_joint(JointMeasurements.of([[*scores[:-1], -np.inf]], **given), super_accuracy=True)
    assert rule.measured.shares == (39 / 40, 1 / 40)
    nan = fit_joint(JointMeasurements.of([[*scores[:-1], np.nan]], **given), super_accuracy=True)
    assert rule.stages == nan.stages


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"target_cost": "a"}, "target_cost='a': must be a number"),
        ({"target_accuracy": np.nan}, "target_accuracy=nan: must be a finite number"),
        ({"target_cost": 9.0, "scores": ["energy"]}, "scores: count=1: give one for each of 2 members"),
    ],
)
def test_goals_that_cannot_be_are_refused(goal: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_joint(drawn(30, 3), **goal)


def test_a_stage_refuses() -> None:
    with pytest.raises(ValueError, match=r"threshold=inf: must be a finite number"):
        Stage(float("inf"))
    with pytest.raises(ValueError, match=r"stages=.*: needs one for each member"):
        JointRule(())
    with pytest.raises(ValueError, match="exactly one of"):
        fit_joint(drawn(30, 3))
    with pytest.raises(ValueError, match=r"target_cost=0\.1: the first member alone costs"):
        fit_joint(drawn(30, 3), target_cost=0.1)
    with pytest.raises(ValueError, match="no thresholds reach it on these 30 records"):
        fit_joint(drawn(30, 3, seed=5), target_accuracy=1.0)

"""What two models give for labelled rows, measured through a cascade."""

import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.cascade.answerer import Answer
from elastic_lm.cascade.endpoint import Function

ROWS = [{"n": n, "label": n % 3} for n in range(40)]


def swift(row: dict) -> Answer:
    return Answer(row["n"] % 2, {"energy": float(row["n"]), "margin": -float(row["n"])}, cost=1.0)


def super_(row: dict) -> Answer:
    return Answer(row["label"], cost=10.0 + row["n"])


def right(row: dict, output: int) -> float:
    return float(output == row["label"])


def test_both_models_answer_every_row() -> None:
    pair = el.measure_cascade(Function(swift), Function(super_), iter(ROWS), right)
    rows = pair.rows
    np.testing.assert_array_equal(rows.scores, np.arange(40))
    np.testing.assert_array_equal(rows.swift, [float(n % 2 == n % 3) for n in range(40)])
    np.testing.assert_array_equal(rows.super_, np.ones(40))
    np.testing.assert_array_equal(rows.cost_swift, np.ones(40))
    np.testing.assert_array_equal(rows.cost_super, 10.0 + np.arange(40))
    rule = pair.fit(super_accuracy=True)
    results = el.Cascade(Function(swift), Function(super_), rule).answer(ROWS)
    assert np.mean([right(row, r.output) for row, r in zip(ROWS, results, strict=True)]) == 1.0
    assert np.mean([r.cost for r in results]) == pytest.approx(rule.measured.cost)
    assert rule.threshold > rows.scores.min()
    other = el.measure_cascade(Function(swift), Function(super_), ROWS, right, score="margin")
    np.testing.assert_array_equal(other.rows.scores, -np.arange(40.0))
    assert other.fit(super_accuracy=True).score == "margin"


def test_what_fails_is_left_out_aloud() -> None:
    def bad(row: dict) -> Answer:
        if row["n"] % 4 == 0:
            raise ConnectionError("503")
        return super_(row)

    with pytest.warns(UserWarning, match="10 of 40 rows failed and are left out.*503"):
        rows = el.measure_cascade(Function(swift), Function(bad), ROWS, right).rows
    np.testing.assert_array_equal(rows.scores, [n for n in range(40) if n % 4])
    with pytest.raises(ValueError, match=r"rows=1: every row failed, the first with: .*503"):
        el.measure_cascade(Function(swift), Function(bad), ROWS[:1], right)


def test_seconds_are_one_median() -> None:
    timed = Function(lambda row: row["label"])
    pair = el.measure_cascade(Function(swift), timed, ROWS, right, cost="seconds")
    assert len(set(pair.rows.cost_super.tolist())) == 1
    assert 0 < pair.rows.cost_super[0] < 0.1
    assert pair.fit(super_accuracy=True).provenance["cost"] == "seconds"


def test_costs_that_nobody_knows() -> None:
    free = Function(lambda row: row["label"])
    with pytest.raises(ValueError, match="cost='flops': the Super's answers have none; give its answerer"):
        el.measure_cascade(Function(swift), free, ROWS, right)
    with pytest.raises(ValueError, match="cost='time': must be one of flops, seconds"):
        el.measure_cascade(Function(swift), Function(super_), ROWS, right, cost="time")

"""What two models give for labelled records, measured through a cascade."""

import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.cascade.answerer import Answer
from elastic_lm.cascade.function import Function

RECORDS = [{"n": n, "label": n % 3} for n in range(40)]


def swift(record: dict) -> Answer:
    return Answer(record["n"] % 2, {"energy": float(record["n"]), "margin": -float(record["n"])}, cost=1.0)


def super_(record: dict) -> Answer:
    return Answer(record["label"], cost=10.0 + record["n"])


def right(record: dict, output: int) -> float:
    return float(output == record["label"])


def test_both_models_answer_every_record() -> None:
    pair = el.measure_cascade(Function(swift), Function(super_), iter(RECORDS), right)
    measurements = pair.measurements
    np.testing.assert_array_equal(measurements.scores, np.arange(40))
    np.testing.assert_array_equal(measurements.swift, [float(n % 2 == n % 3) for n in range(40)])
    np.testing.assert_array_equal(measurements.super_, np.ones(40))
    np.testing.assert_array_equal(measurements.cost_swift, np.ones(40))
    np.testing.assert_array_equal(measurements.cost_super, 10.0 + np.arange(40))
    rule = pair.fit(super_accuracy=True)
    results = el.Cascade(Function(swift), Function(super_), rule).answer(RECORDS)
    assert np.mean([right(record, r.output) for record, r in zip(RECORDS, results, strict=True)]) == 1.0
    assert np.mean([r.cost for r in results]) == pytest.approx(rule.measured.cost)
    assert rule.threshold > measurements.scores.min()
    other = el.measure_cascade(Function(swift), Function(super_), RECORDS, right, score="margin")
    np.testing.assert_array_equal(other.measurements.scores, -np.arange(40.0))
    assert other.fit(super_accuracy=True).score == "margin"


def test_what_fails_is_left_out_aloud() -> None:
    def bad(record: dict) -> Answer:
        if record["n"] % 4 == 0:
            raise ConnectionError("503")
        return super_(record)

    with pytest.warns(UserWarning, match="10 of 40 records failed and are left out.*503"):
        measurements = el.measure_cascade(Function(swift), Function(bad), RECORDS, right).measurements
    np.testing.assert_array_equal(measurements.scores, [n for n in range(40) if n % 4])
    with pytest.raises(ValueError, match=r"records=1: every record failed, the first with: .*503"):
        el.measure_cascade(Function(swift), Function(bad), RECORDS[:1], right)


def test_seconds_are_one_median() -> None:
    timed = Function(lambda record: record["label"])
    pair = el.measure_cascade(Function(swift), timed, RECORDS, right, cost="seconds")
    assert len(set(pair.measurements.cost_super.tolist())) == 1
    assert 0 < pair.measurements.cost_super[0] < 0.1
    assert pair.fit(super_accuracy=True).provenance["cost"] == "seconds"


def test_costs_that_nobody_knows() -> None:
    free = Function(lambda record: record["label"])
    with pytest.raises(ValueError, match="cost='flops': the Super's answers have none; give its answerer"):
        el.measure_cascade(Function(swift), free, RECORDS, right)
    with pytest.raises(ValueError, match="cost='time': must be one of flops, seconds"):
        el.measure_cascade(Function(swift), Function(super_), RECORDS, right, cost="time")

"""Cascades of more than two members: who answers, what is resumed, what is fallen back on, what it costs."""

from collections.abc import Sequence

import numpy as np
import pytest

from elastic_lm.cascade.answerer import Answer, Record
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.function import Function
from elastic_lm.cascade.joint_rule import JointRule
from elastic_lm.cascade.measure import measure_members
from elastic_lm.cascade.rule import CascadeRule, Stage
from elastic_lm.cascade.scores import Scoring
from elastic_lm.config.cascade import member_names

RECORDS = 1100


def score(record: Record, member: int) -> float:
    return float(record["n"] * (7919 + 1000 * member) % 101)


def member(number: int, batches: list[int] | None = None) -> Function:
    def answer(records: Sequence[Record]) -> list[Answer]:
        if batches is not None:
            batches.append(len(records))
        return [
            Answer(f"{number}: {r['n']}", {"energy": score(r, number)}, cost=10.0**number) for r in records
        ]

    return Function(answer, batches=True)


def expected(record: Record, thresholds: Sequence[float]) -> int:
    return next((i for i, t in enumerate(thresholds) if score(record, i) >= t), len(thresholds))


@pytest.mark.parametrize("thresholds", [(50.0, 30.0), (60.0, 60.0, 60.0), (90.0, 1e9, 20.0, 40.0)])
def test_a_record_stays_with_the_first_member_that_is_sure(thresholds: tuple[float, ...]) -> None:
    k = len(thresholds) + 1
    batches: list[list[int]] = [[] for _ in range(k)]
    first, *between, last = (member(i, batches[i]) for i in range(k))
    cascade = Cascade(first, last, thresholds, between=between, batch_size=8, super_batch_size=5)
    records = [{"n": n} for n in range(RECORDS)]
    run = cascade.run(iter(records))
    results = list(run)
    assert [result.index for result in results] == list(range(RECORDS))
    by = [expected(record, thresholds) for record in records]
    for record, result, i in zip(records, results, by, strict=True):
        assert result.output == f"{i}: {record['n']}"
        assert result.model == member_names(k)[i]
        assert len(result.answers) == i + 1
        assert result.cost == sum(10.0**j for j in range(i + 1))
        assert result.scores == tuple(score(record, j) for j in range(min(i, k - 2) + 1))
        assert result.score == result.scores[-1]
    asked = [sum(i >= j for i in by) for j in range(k)]
    for j, (sizes, size) in enumerate(zip(batches, [8] * (k - 1) + [5], strict=True)):
        assert sum(sizes) == asked[j]
        assert sum(s < size for s in sizes) <= 1 + k * (RECORDS // cascade.most_held)  # but for held ones
    stats = run.statistics()
    assert [m.answered for m in stats.members] == [by.count(j) for j in range(k)]
    assert [m.asked for m in stats.members] == asked
    assert stats.to_super == by.count(k - 1)
    assert stats.cost == pytest.approx(sum(result.cost for result in results))
    assert stats.text().count("asked about") == k


def test_names_and_numbers_of_members() -> None:
    assert member_names(2) == ("swift", "super")
    assert member_names(3) == ("swift", "middle", "super")
    assert member_names(4) == ("swift", "middle_1", "middle_2", "super")
    three = (member(0), member(2))
    with pytest.raises(ValueError, match="rule: thresholds=1: give one for each of the 2 members before"):
        Cascade(*three, 0.5, between=[member(1)])
    with pytest.raises(ValueError, match="rule: thresholds=3: give one for each of the 2 members before"):
        Cascade(*three, (0.5, 0.5, 0.5), between=[member(1)])
    with pytest.raises(ValueError, match="rule: thresholds=1: give one for each of the 2"):
        Cascade(*three, CascadeRule(0.5), between=[member(1)])
    with pytest.raises(ValueError, match="between=3: must be an answerer"):
        Cascade(*three, (0.5, 0.5), between=[3])
    stages = (Stage(1e9), Stage(0.5, "margin"))
    wrong = Cascade(*three, JointRule(stages), between=[member(1)])
    with pytest.raises(ValueError, match="middle's answer to record 0 has energy; choose one of them"):
        wrong.answer([{"n": 1}])


def test_energies_of_every_member_are_checked() -> None:
    middle = member(1)
    middle.scoring = Scoring(temperature=3.0)
    rule = JointRule((Stage(0.0, "max_prob"), Stage(0.0, temperature=2.0)))
    with pytest.raises(ValueError, match=r"middle.scoring.temperature=3.0: the rule was fitted with 2.0"):
        Cascade(member(0), member(2), rule, between=[middle])


def test_failures_go_on_and_the_largest_answer_is_the_fallback() -> None:
    def failing(number: int, fails: set[int], scores: bool = True) -> Function:
        def answer(record: Record) -> Answer:
            if record["n"] in fails:
                raise RuntimeError("down")
            return Answer(number, {"energy": -1.0} if scores else {}, cost=1.0)

        return Function(answer)

    members = failing(0, {1}), failing(1, {1, 2}), failing(2, {0, 1, 2, 3}, scores=False)
    cascade = Cascade(members[0], members[2], (0.0, 0.0), between=members[1:2], batch_size=3)
    results = cascade.answer([{"n": n} for n in range(5)])
    assert [result.fallback for result in results] == [1, None, 0, 1, None]
    assert [result.fallback_member for result in results] == [1, None, 0, 1, None]
    assert [result.output for result in results] == [None, None, None, None, 2]
    assert [result.scores for result in results] == [(-1.0, -1.0), (None, None), (-1.0, None)] + [
        (-1.0, -1.0)
    ] * 2


class Previewing:
    """Knows its score before it answers; a model of its own."""

    def __init__(self, number: int, fails: tuple[int, ...] = ()) -> None:
        self.number, self.fails, self.finished = number, fails, 0

    def previews(self, score: str) -> bool:
        return True

    def answer(self, records: Sequence[Record]) -> list[Answer]:
        return [
            Answer(self.number, preview.scores, cost=5.0, preview=preview)
            for preview in self.preview(records)
        ]

    def preview(self, records: Sequence[Record]) -> list[Answer]:
        return [Answer(None, {"energy": score(r, self.number)}, cost=1.0, prepared="kv") for r in records]

    def finish(self, records: Sequence[Record], previews: Sequence[Answer]) -> list[Answer]:
        assert all(preview.prepared == "kv" for preview in previews)
        self.finished += len(records)
        bad = Answer(error="cannot")
        return [
            bad if r["n"] in self.fails else a for r, a in zip(records, self.answer(records), strict=True)
        ]


def test_every_member_may_preview() -> None:
    def last(record: Record) -> str:
        if record["n"] % 10 == 3:
            raise RuntimeError("down")
        return "last"

    first, middle = Previewing(0), Previewing(1)
    cascade = Cascade(first, Function(last, cost=50.0), (60.0, 40.0), between=[middle], batch_size=4)
    records = [{"n": n} for n in range(200)]
    results = cascade.answer(records)
    by = [expected(record, (60.0, 40.0)) for record in records]
    assert [member_names(3).index(result.model) for result in results] == by
    assert (first.finished, middle.finished) == (by.count(0), by.count(1))
    for record, result, i in zip(records, results, by, strict=True):
        fell = i == 2 and record["n"] % 10 == 3
        assert result.cost == [5.0, 6.0, 52.0 if not fell else 1.0 + 1.0 + 5.0][i]
        assert result.fallback == (1 if fell else None)
        assert all(answer.prepared is None for answer in result.answers)


def test_what_fails_to_be_finished_goes_to_the_next_member() -> None:
    middle = Previewing(1, fails=(0, 4))
    cascade = Cascade(member(0), member(2), (1e9, -1.0), between=[middle], batch_size=2)
    results = cascade.answer([{"n": n} for n in range(6)])
    assert [result.model for result in results] == ["super", "middle", "middle", "middle", "super", "middle"]
    assert results[0].scores == (score({"n": 0}, 0), None)


class Layers:
    """A part of a model that says what it resumed from."""

    def __init__(self, layers: int, weights: object = None, hands_over: bool = True) -> None:
        self.layers, self.hands_over = layers, hands_over
        self.weights = weights

    def answer(self, records: Sequence[Record]) -> list[Answer]:
        return self.resume(records, [Answer(handover=None)] * len(records))

    def resume(self, records: Sequence[Record], earlier: Sequence[Answer]) -> list[Answer]:
        done = [a.handover or 0 for a in earlier]
        state = self.layers if self.hands_over else None
        return [Answer(d, {"energy": -1.0}, float(self.layers - d), handover=state) for d in done]


@pytest.mark.parametrize(
    ("members", "resumed"),
    [
        ([("a", 2), ("a", 4), ("a", 8)], [0, 2, 4]),
        ([("a", 2), (None, 3), ("a", 8)], [0, 0, 2]),  # a sub-network between an exit and the whole model
        ([("a", 2), ("b", 6), ("a", 8)], [0, 0, 2]),  # another model between them
        ([("a", 2), ("b", 6), ("b", 8)], [0, 0, 6]),
        ([("a", 2), ("b", 8)], [0, 0]),
        ([(None, 2), (None, 8)], [0, 2]),  # as two members that say nothing have always been
    ],
)
def test_members_resume_from_the_same_weights_alone(members: list, resumed: list[int]) -> None:
    parts = [Layers(layers, weights) for weights, layers in members]
    cascade = Cascade(parts[0], parts[-1], (0.0,) * (len(parts) - 1), between=parts[1:-1], batch_size=2)
    for result in cascade.answer([{"n": n} for n in range(5)]):
        assert [answer.output for answer in result.answers] == resumed
        assert all(answer.handover is None for answer in result.answers)


def test_random_scores_of_members_are_independent() -> None:
    def scoreless(number: int) -> Function:
        return Function(lambda record: Answer(number))

    cascade = Cascade(scoreless(0), scoreless(2), (0.5, 0.5), between=[scoreless(1)], score="random")
    shares = np.bincount([r.output for r in cascade.answer([{}] * 2000)]) / 2000
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=0.04)


def test_what_is_measured_is_what_a_run_costs() -> None:
    records = [{"n": n} for n in range(400)]
    members = Previewing(0), member(1), member(2)

    def quality(record: Record, output) -> float:
        sure = score(record, 0) > 60 if output == 0 else score(record, 1) > 50
        return float(sure or str(output).startswith("2"))

    measured = measure_members(members, records, quality, seed=3)
    rule = measured.fit(super_accuracy=True)
    assert rule.measured.shares[2] < 0.4
    results = Cascade(members[0], members[2], rule, between=members[1:2], batch_size=7).answer(records)
    assert np.mean([r.cost for r in results]) == pytest.approx(rule.measured.cost)
    assert np.mean([quality(records[r.index], r.output) for r in results]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="members=1: a cascade has at least 2"):
        measure_members(members[:1], records, quality)
    with pytest.raises(ValueError, match=r"scores=\['a'\]: give one for each of the 2 before the last"):
        measure_members(members, records, quality, scores=["a"])


def test_records_that_a_member_fails_on_are_left_out() -> None:
    bad = Function(lambda record: Answer(1, {"energy": 1.0 / record["n"]}, 1.0))
    with pytest.warns(UserWarning, match=r"1 of 5 records failed and are left out: ZeroDivisionError"):
        measured = measure_members(
            (member(0), bad, member(2)), [{"n": n} for n in range(5)], lambda r, o: 1.0
        )
    assert len(measured.measurements) == 4

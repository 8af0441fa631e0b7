"""A cascade of cheap functions: order, who answers, whole batches, bounded memory, failures."""

from collections.abc import Sequence

import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.cascade.answerer import Answer, Record
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.function import Function
from elastic_lm.cascade.queue import BatchQueue, QueuedRecord
from elastic_lm.cascade.scores import Scoring, random_score


class Watched:
    """Answers like a function and remembers its batches; records are batched by `n % kinds`."""

    def __init__(self, function, kinds: int = 1) -> None:
        self.function, self.kinds, self.batches = function, kinds, []

    def bucket(self, record: Record) -> int:
        return record["n"] % self.kinds

    def answer(self, records: Sequence[Record]) -> list[Answer]:
        self.batches.append([record["n"] for record in records])
        return [self.function(record) for record in records]


def swift_answer(record: Record) -> Answer:
    return Answer(f"swift {record['n']}", {"energy": random_score(7, record["n"])}, cost=1.0)


def super_answer(record: Record) -> Answer:
    return Answer(f"super {record['n']}", cost=10.0)


def numbered(count: int):
    return ({"n": i} for i in range(count))


@pytest.mark.parametrize("kinds", [1, 3])
def test_ten_thousand_records(kinds: int) -> None:
    swift, super_ = Watched(swift_answer, kinds), Watched(super_answer, kinds)
    run = Cascade(swift, super_, 0.3, batch_size=16, super_batch_size=8).run(numbered(10_000))
    results = list(run)
    assert [r.index for r in results] == list(range(10_000))
    for n, result in enumerate(results):
        sure = random_score(7, n) >= 0.3
        alone = swift_answer({"n": n}) if sure else super_answer({"n": n})
        assert (result.model == "swift", result.answer) == (sure, alone)
        assert result.cost == (1.0 if sure else 11.0)
    stats = run.statistics()
    assert stats.records == 10_000
    assert stats.failed == 0
    assert stats.to_super == sum(r.model == "super" for r in results)
    assert stats.share_super == pytest.approx(0.3, abs=0.02)
    assert stats.cost == 10_000 + 10.0 * stats.to_super
    assert stats.mean_cost == pytest.approx(1 + 10 * stats.share_super)
    assert 0 < stats.latency_p50 <= stats.latency_p95
    assert "to the Super" in stats.text()
    for answerer, size in ((swift, 16), (super_, 8)):  # batches are whole, of one bucket, but for the last
        assert all(len(batch) == size for batch in answerer.batches[: -2 * kinds])
        assert all(len({n % kinds for n in batch}) == 1 for batch in answerer.batches)


def test_reads_no_further_ahead_than_it_may() -> None:
    read = 0

    def records():
        nonlocal read
        for record in numbered(500):
            read += 1
            yield record

    # a single record in a hundred is passed on to the Super, whose batches would never be full
    super_ = Watched(super_answer)
    swift = Function(lambda record: Answer(0, {"energy": float(record["n"] % 100 != 5)}))
    cascade = Cascade(swift, super_, 0.5, batch_size=4, super_batch_size=64, most_held=20)
    for given, result in enumerate(cascade.run(records())):
        assert result.index == given
        assert read - given <= 20
    assert [len(batch) for batch in super_.batches] == [1] * 5


def test_ties_stay_and_a_missing_score_is_named() -> None:
    swift = Function(lambda record: Answer("swift", {"energy": 1.31044, "max_prob": float("nan")}))
    super_ = Function(lambda record: "super")
    assert [r.output for r in Cascade(swift, super_, 1.31044).answer([{}])] == ["swift"]
    assert [r.output for r in Cascade(swift, super_, 1.3105).answer([{}])] == ["super"]
    assert [r.output for r in Cascade(swift, super_, -9.0, score="max_prob").answer([{}])] == ["super"]
    message = r"score='margin': the Swift's answer to record 0 has energy, max_prob"
    with pytest.raises(ValueError, match=message):
        Cascade(swift, super_, 0.0, score="margin").answer([{}])


def test_a_single_answer_without_the_score_is_a_failure_of_the_swift() -> None:
    def swift(record: Record) -> Answer:
        scores = {} if record["n"] == 50 else {"energy": None if record["n"] == 51 else 1.0}
        return Answer("swift", scores, 1.0)

    run = Cascade(Function(swift), Function(lambda record: "super"), 0.5, batch_size=8).run(numbered(100))
    results = list(run)
    assert [r.index for r in results if r.output != "swift"] == [50, 51]
    assert [r.output for r in results[50:52]] == ["super"] * 2
    assert "score='energy': the Swift's answer to record 50 has none" in str(results[50].swift.error)
    assert (run.statistics().swift_failed, run.statistics().failed) == (2, 0)


def test_random_scores_go_by_the_record_not_the_batch() -> None:
    rule = el.CascadeRule(0.5, "random", seed=3)
    cascade = Cascade(Function(lambda record: 0), Function(lambda record: 1), rule)
    whole = [r.model for r in cascade.run(numbered(100))]
    assert [r.model for r in cascade.run(list(numbered(100))[40:], start=40)] == whole[40:]
    assert 30 < whole.count("super") < 70


def test_failures_are_reported_and_the_rest_is_finished() -> None:
    def super_function(record: Record) -> str:
        if record["n"] % 3 == 0:
            raise RuntimeError("no luck")
        return "super"

    def swift_function(record: Record) -> Answer:
        if record["n"] == 4:
            raise KeyError("text")
        return Answer("swift", {"energy": float(record["n"] >= 6)})

    run = Cascade(Function(swift_function), Function(super_function), 0.5, batch_size=4).run(numbered(9))
    results = list(run)
    outputs = [r.output for r in results]
    assert outputs == [None, "super", "super", None, "super", "super", "swift", "swift", "swift"]
    assert [r.error for r in results if r.error] == ["RuntimeError: no luck"] * 2
    assert [r.fallback for r in results] == ["swift", None, None, "swift", *[None] * 5]
    assert (results[4].swift.error, results[4].score) == ("KeyError: 'text'", None)
    stats = run.statistics()
    assert (stats.failed, stats.swift_failed, stats.to_super) == (2, 1, 6)


class Resuming:
    """A Super that continues from what the Swift hands over."""

    def answer(self, records: Sequence[Record]) -> list[Answer]:
        return [Answer(2 * record["n"], cost=10.0) for record in records]

    def resume(self, records: Sequence[Record], swift_answers: Sequence[Answer]) -> list[Answer]:
        return [Answer(2 * answer.handover, cost=4.0) for answer in swift_answers]


def test_a_super_resumes_and_handovers_are_let_go() -> None:
    swift = Function(lambda record: Answer("?", {"energy": 0.0}, 1.0, handover=record["n"]))
    results = Cascade(swift, Resuming(), 1.0, batch_size=4).answer(list(numbered(10)))
    assert [(r.output, r.cost) for r in results] == [(2 * n, 5.0) for n in range(10)]
    assert all(r.answer.handover is None and r.swift.handover is None for r in results)
    empty_handed = Function(lambda record: Answer("?", {"energy": 0.0}, 1.0))
    assert {r.cost for r in Cascade(empty_handed, Resuming(), 1.0).answer(list(numbered(3)))} == {11.0}


class Previewing(Watched):
    """A Swift that knows its energy for a cost of 1, and answers for 4."""

    def __init__(self, fails: tuple[int, ...] = ()) -> None:
        super().__init__(self.whole, kinds=2)
        self.previewed, self.finished, self.fails = [], [], fails

    def whole(self, record: Record) -> Answer:
        return Answer(f"swift {record['n']}", {"energy": 1.0, **self.known(record)}, cost=4.0)

    def known(self, record: Record) -> dict[str, float]:
        return {"encoder_energy": random_score(7, record["n"])}

    def previews(self, score: str) -> bool:
        return score == "encoder_energy"

    def preview(self, records: Sequence[Record]) -> list[Answer]:
        self.previewed.append([record["n"] for record in records])
        return [Answer(None, self.known(record), 1.0, prepared=record["n"]) for record in records]

    def finish(self, records: Sequence[Record], previews: Sequence[Answer]) -> list[Answer]:
        assert [preview.prepared for preview in previews] == [record["n"] for record in records]
        self.finished.append([record["n"] for record in records])
        return [Answer(error="no") if record["n"] in self.fails else self.whole(record) for record in records]


def test_a_swift_that_previews_answers_what_it_keeps_alone() -> None:
    swift, super_ = Previewing(), Resuming()
    how = {"score": "encoder_energy", "batch_size": 4}
    run = Cascade(swift, super_, 0.4, **how).run(numbered(1000))
    results = list(run)
    assert [r.index for r in results] == list(range(1000))
    for n, result in enumerate(results):
        kept = random_score(7, n) >= 0.4
        assert (result.model == "swift", result.score) == (kept, random_score(7, n))
        assert result.answer == (swift.whole({"n": n}) if kept else Answer(2 * n, cost=10.0))
        assert result.cost == (4.0 if kept else 11.0)
        assert (result.swift.cost, result.swift.handover) == (4.0 if kept else 1.0, None)
    stats = run.statistics()
    assert stats.swift_cost == 4.0 * (1000 - stats.to_super) + stats.to_super
    assert stats.super_cost == 10.0 * stats.to_super
    assert not swift.batches
    assert sorted(n for batch in swift.finished for n in batch) == [
        r.index for r in results if r.model == "swift"
    ]
    for batches in (swift.previewed, swift.finished):  # whole, and of one bucket
        assert all(len(batch) == 4 for batch in batches[:-2])
        assert all(len({n % 2 for n in batch}) == 1 for batch in batches)
    every = Cascade(swift, super_, 0.4, **how, preview=False).answer(list(numbered(8)))
    assert {r.swift.cost for r in every} == {4.0}
    assert {r.swift.cost for r in Cascade(swift, super_, 2.0).answer(list(numbered(8)))} == {4.0}


def test_previewed_records_that_fail_go_on_and_fall_back() -> None:
    scores = [random_score(7, n) for n in range(8)]
    order = np.argsort(scores).tolist()
    down, lost, kept = order[0], order[-1], sorted(order[4:-1])

    def super_function(record: Record) -> str:
        if record["n"] == down:
            raise RuntimeError("no luck")
        return "super"

    swift, how = Previewing(fails=(lost,)), {"score": "encoder_energy", "batch_size": 3}
    cascade = Cascade(swift, Function(super_function), scores[order[4]], **how)
    results = cascade.answer(list(numbered(8)))
    assert (results[down].error, results[down].fallback) == ("RuntimeError: no luck", f"swift {down}")
    assert results[down].swift.cost == 5.0  # previewed, and then answered from the start
    assert (results[lost].model, results[lost].output, results[lost].score) == ("super", "super", None)
    assert [r.index for r in results if r.model == "swift"] == kept


def test_a_rule_of_other_energies_is_refused() -> None:
    class Scored(Watched):
        scoring = Scoring(2.0)

    with pytest.raises(ValueError, match=r"swift.scoring.temperature=2.0: the rule was fitted with 1.0"):
        Cascade(Scored(swift_answer), Watched(super_answer), el.CascadeRule(0.0))
    assert Cascade(Scored(swift_answer), Watched(super_answer), 0.0).rule.temperature == 2.0


@pytest.mark.parametrize("name", ["batch_size", "super_batch_size", "most_held"])
def test_sizes_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        Cascade(Watched(swift_answer), Watched(super_answer), 0.0, **{name: 0})


def test_a_score_that_no_model_of_ours_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    swift = Function(lambda record: 0)
    Cascade(swift, swift, 0.5, score="frob")  # a function may give any score
    monkeypatch.setattr(swift, "scoring", Scoring(), raising=False)
    with pytest.raises(ValueError, match="score='frob': must be one of energy, "):
        Cascade(swift, swift, 0.5, score="frob")
    with pytest.raises(ValueError, match="score='frob'"):
        Cascade(swift, swift, el.CascadeRule(0.5, "frob"))


def test_an_answerer_that_loses_records_is_named() -> None:
    class Short(Watched):
        def answer(self, records: Sequence[Record]) -> list[Answer]:
            return super().answer(records)[:-1]

    with pytest.raises(ValueError, match=r"swift answers=1: answer one per record \(2\)"):
        Cascade(Short(swift_answer), Watched(super_answer), 0.0).answer(list(numbered(2)))


def test_a_queue_gives_every_record_once() -> None:
    queue = BatchQueue(Watched(swift_answer, 3), 4)
    order = np.random.default_rng(0).permutation(50).tolist()
    batches = [queue.add(QueuedRecord(n, {"n": n}, 0.0)) for n in order]
    batches += [queue.take_batch_of(n) for n in range(50)]
    assert sorted(queued.index for batch in batches for queued in batch) == list(range(50))


def test_functions_of_batches() -> None:
    whole = Function(lambda records: [record["n"] + 1 for record in records], cost=3.0, batches=True)
    assert [(a.output, a.cost) for a in whole.answer(list(numbered(3)))] == [(1, 3.0), (2, 3.0), (3, 3.0)]
    short = Function(lambda records: [0], batches=True)
    assert {a.error for a in short.answer(list(numbered(2)))} == {
        "ValueError: outputs=1: give one per record (2)"
    }
    with pytest.raises(ValueError, match="cost=-1"):
        Function(len, cost=-1.0)

"""What a Swift and a Super give for labelled records, from which a threshold between them is chosen."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import numpy as np

from elastic_lm.cascade.answerer import Answer, Answerer, Record, can_preview
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.joint import JointMeasurements
from elastic_lm.cascade.joint_rule import JointRule, fit_joint
from elastic_lm.cascade.results import CascadeResult
from elastic_lm.cascade.rule import CascadeRule, Stage, fit_rule
from elastic_lm.cascade.scores import PLAIN, Scoring
from elastic_lm.cascade.sweep import ALWAYS_SUPER, Measurements
from elastic_lm.config.cascade import BATCH_SIZE, DEFAULT_SCORE, CostUnit
from elastic_lm.config.checks import require, require_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredPair:
    """What was measured of two models on labelled records, from which `fit` chooses a threshold.

    Example:
      ```python
      from elastic_lm.cascade import Answer, CascadeRisk, Function, measure_cascade

      swift = Function(lambda record: Answer(record["n"] % 2, {"energy": float(record["n"])}, cost=1.0))
      super_ = Function(lambda record: record["label"], cost=10.0)
      labelled = [{"n": n, "label": n % 2 if n > 20 else 1} for n in range(400)]
      pair = measure_cascade(swift, super_, labelled, lambda record, output: output == record["label"])

      # The same answers serve every goal.
      cheap = pair.fit(target_accuracy=0.98)
      exact = pair.fit(super_accuracy=True)
      safe = pair.fit(risk=CascadeRisk(loss=0.05))
      assert cheap.measured.cost < exact.measured.cost
      assert safe.guarantee.achieved
      ```
    """

    measurements: Measurements
    score: str  # what `measurements.scores` holds
    scoring: Scoring  # of the Swift's energy
    seed: int  # of the score "random"
    unit: CostUnit  # of the costs

    def fit(self, **goal: Any) -> CascadeRule:
        """Chooses a threshold.

        Args:
          **goal: one of target_accuracy, target_cost, super_accuracy and risk, and what else `fit_rule` is to
            record, such as models and data.

        Returns:
          The rule of this score.

        Raises:
          ValueError: not exactly one goal is given, or it is out of reach.
        """
        recorded: dict[str, Any] = {"score": self.score, "scoring": self.scoring, "unit": self.unit}
        return fit_rule(self.measurements, **recorded, seed=self.seed, **goal)


def measure_cascade(
    swift: Answerer,
    super_: Answerer,
    records: Iterable[Record],
    quality: Callable[[Record, Any], float],
    *,
    score: str = DEFAULT_SCORE,
    seed: int = 0,
    cost: CostUnit = "flops",
    batch_size: int = BATCH_SIZE,
) -> MeasuredPair:
    """Has both models answer every labelled record; `MeasuredPair.fit` then chooses a threshold.

    A Super that can resume continues from what the Swift hands over, and its cost is that of the rest.

    Args:
      swift: the small model.
      super_: the large model.
      records: with whatever `quality` reads. Neither model should have been trained on them.
      quality: from a record and an output for it to a number in [0, 1]: whether the output is right.
      score: of the Swift, one of `scores.SCORES` or another that it gives.
      seed: of the score "random".
      cost: what a record costs: FLOPs, or the median seconds over all records.
      batch_size: records that are read at once.

    Returns:
      What thresholds are chosen on. Records that a model failed on are left out, with a warning.

    Raises:
      ValueError: the Swift has no such score, every record failed, or nobody knows what the Super costs.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.cascade import Answer, Function

      # The Swift is right about short texts, and its energy falls with the length.
      swift = Function(lambda record: Answer("short", {"energy": -float(len(record["text"]))}, cost=1.0))
      super_ = Function(lambda record: "short" if len(record["text"]) < 5 else "long", cost=10.0)
      labelled = [{"text": "x" * n, "label": "short" if n < 5 else "long"} for n in range(10)]

      pair = el.measure_cascade(swift, super_, labelled, lambda record, output: output == record["label"])
      rule = pair.fit(super_accuracy=True)
      assert (rule.measured.accuracy, rule.measured.share_super, rule.measured.cost) == (1.0, 0.5, 6.0)
      ```
    """
    require_choice("cost", cost, get_args(CostUnit))
    records = list(records)

    # A threshold that no score reaches makes both models answer every record.
    scoring = getattr(swift, "scoring", PLAIN)
    rule = CascadeRule(ALWAYS_SUPER, score, temperature=scoring.temperature, centre=scoring.centre, seed=seed)
    results = Cascade(swift, super_, rule, batch_size=batch_size, preview=False).answer(records)
    good = _answered(results, len(records))
    known, kept = swift_costs([r.swift for r in good], cost, can_preview(swift, score))
    super_costs = answer_costs([r.answer for r in good], cost)
    _require_costs(super_costs, cost)
    measurements = Measurements.of(
        scores=[np.nan if r.score is None else r.score for r in good],
        swift=[quality(records[r.index], r.swift.output) for r in good],
        super_=[quality(records[r.index], r.output) for r in good],
        cost_swift=known,
        cost_super=super_costs,
        cost_kept=kept,
    )
    return MeasuredPair(measurements=measurements, score=score, scoring=scoring, seed=seed, unit=cost)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredMembers:
    """What was measured of the members of a cascade on labelled records; `fit` chooses all thresholds.

    Example:
      ```python
      from elastic_lm.cascade import Answer, CascadeRisk, Function, measure_members

      def member(known, cost):  # is right about, and sure of, the first `known` of ten kinds of records
          answer = lambda r: Answer(r["n"] % 10 < known, {"energy": float(-(r["n"] % 10))}, cost)
          return Function(answer)

      members = member(4, 1.0), member(8, 10.0), member(10, 100.0)
      labelled = [{"n": n, "label": True} for n in range(1000)]
      measured = measure_members(members, labelled, lambda record, output: output == record["label"])

      rule = measured.fit(super_accuracy=True)
      assert rule.measured.shares == (0.4, 0.4, 0.2)
      assert measured.fit(risk=CascadeRisk(loss=0.05)).guarantee.achieved
      ```
    """

    measurements: JointMeasurements
    scores: tuple[str, ...]  # what `measurements.scores` holds
    scorings: tuple[Scoring, ...]  # of the members' energies
    seed: int  # of the score "random"
    unit: CostUnit  # of the costs

    def fit(self, **goal: Any) -> JointRule:
        """Chooses the thresholds.

        Args:
          **goal: one of target_accuracy, target_cost, super_accuracy and risk, and what else `fit_joint` is
            to record, such as models and data.

        Returns:
          The rule of these scores.

        Raises:
          ValueError: not exactly one goal is given, or it is out of reach.
        """
        recorded: dict[str, Any] = {"scores": self.scores, "scorings": self.scorings, "unit": self.unit}
        return fit_joint(self.measurements, **recorded, seed=self.seed, **goal)


def measure_members(
    members: Sequence[Answerer],
    records: Iterable[Record],
    quality: Callable[[Record, Any], float],
    *,
    scores: Sequence[str] | str = DEFAULT_SCORE,
    seed: int = 0,
    cost: CostUnit = "flops",
    batch_size: int = BATCH_SIZE,
) -> MeasuredMembers:
    """Has every member of a cascade answer every labelled record, as `measure_cascade` does for two.

    A member that can resume continues from what an earlier one hands over, and its cost is that of the rest.

    Args:
      members: from the smallest to the largest, at least two.
      records: with whatever `quality` reads. No member should have been trained on them.
      quality: from a record and an output for it to a number in [0, 1]: whether the output is right.
      scores: of every member but the last, or one name for all.
      seed: of the score "random".
      cost: what a record costs: FLOPs, or the median seconds over all records.
      batch_size: records that are read at once.

    Returns:
      What thresholds are chosen on. Records that a member failed on are left out, with a warning.

    Raises:
      ValueError: there are fewer than two members, one has no such score, every record failed, or nobody
        knows what the last one costs.

    Example:
      ```python
      from elastic_lm.cascade import Answer, Function, measure_members

      exit_ = Function(lambda r: Answer(r["n"] > 3, {"energy": float(abs(r["n"] - 3))}, cost=1.0))
      half = Function(lambda r: Answer(r["n"] > 4, {"energy": float(abs(r["n"] - 4))}, cost=4.0))
      whole = Function(lambda r: r["n"] > 5, cost=16.0)
      records = [{"n": n} for n in range(10)]

      measured = measure_members((exit_, half, whole), records, lambda r, output: output == (r["n"] > 5))
      rule = measured.fit(super_accuracy=True)
      assert rule.measured.accuracy == 1.0
      assert rule.measured.cost < 1.0 + 4.0 + 16.0
      ```
    """
    require_choice("cost", cost, get_args(CostUnit))
    require(len(members) >= 2, "members", len(members), "a cascade has at least 2")
    records, before = list(records), members[:-1]
    names = [scores] * len(before) if isinstance(scores, str) else list(scores)
    require(
        len(names) == len(before), "scores", names, f"give one for each of the {len(before)} before the last"
    )
    scorings = [getattr(member, "scoring", PLAIN) for member in before]

    # Thresholds that no score reaches make all members answer every record.
    rule = JointRule(
        tuple(
            Stage(ALWAYS_SUPER, name, temperature=own.temperature, centre=own.centre)
            for name, own in zip(names, scorings, strict=True)
        ),
        seed=seed,
    )
    how: dict[str, Any] = {"between": members[1:-1], "batch_size": batch_size, "preview": False}
    good = _answered(Cascade(members[0], members[-1], rule, **how).answer(records), len(records))

    columns = list(zip(*(r.answers for r in good), strict=True))
    pairs = [
        swift_costs(answers, cost, can_preview(member, name))
        for answers, member, name in zip(columns, before, names, strict=False)
    ]
    last = answer_costs(columns[-1], cost)
    _require_costs(last, cost)
    measurements = JointMeasurements.of(
        scores=[
            [np.nan if (score := r.scores[i]) is None else score for r in good] for i in range(len(before))
        ],
        qualities=[
            [quality(records[r.index], answer.output) for r, answer in zip(good, answers, strict=True)]
            for answers in columns
        ],
        costs=[*(known for known, _ in pairs), last],
        kept=[kept for _, kept in pairs],
    )
    return MeasuredMembers(
        measurements=measurements, scores=tuple(names), scorings=tuple(scorings), seed=seed, unit=cost
    )


def _answered(results: Sequence[CascadeResult], total: int) -> list[CascadeResult]:
    """The results that no member failed on; warns of the others.

    Raises:
      ValueError: every record failed.
    """
    errors = [next((a.error for a in r.answers if a.error is not None), None) for r in results]
    good = [result for result, error in zip(results, errors, strict=True) if error is None]
    if first := next(filter(None, errors), None):
        require(bool(good), "records", total, f"every record failed, the first with: {first}")
        count = total - len(good)
        warnings.warn(f"{count} of {total} records failed and are left out: {first}", stacklevel=3)
    return good


def _require_costs(costs: np.ndarray, unit: CostUnit) -> None:
    fix = "the Super's answers have none; give its answerer a cost, or measure cost='seconds'"
    require(bool(np.any(costs > 0)), "cost", unit, fix)


def swift_costs(answers: Sequence[Answer], unit: CostUnit, previewed: bool) -> tuple[np.ndarray, np.ndarray]:
    """A Swift's costs until its score is known, and those of what it does afterwards.

    Args:
      answers: of the Swift.
      unit: of the costs.
      previewed: whether the Swift knows its score before it answers.
    """
    whole = answer_costs(answers, unit)
    known = answer_costs([answer.preview or answer for answer in answers], unit) if previewed else whole
    return known, whole - known


def answer_costs(answers: Sequence[Answer], unit: CostUnit) -> np.ndarray:
    """[N] FLOPs, or one number of seconds: the median, which the time of compiling does not move."""
    if unit == "seconds":
        return np.asarray(np.median([answer.seconds for answer in answers]))
    return np.asarray([answer.cost for answer in answers])

"""The rule that decides between a Swift and a Super model: how it is fitted, and the file it lives in."""

import dataclasses
import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_lm.cascade.guarantee import CascadeGuarantee, CascadeRisk, control
from elastic_lm.cascade.scores import PLAIN, Scoring
from elastic_lm.cascade.sweep import (
    CascadeCurve,
    CascadePoint,
    Measurements,
    cheapest,
    like_super,
    most_accurate,
    sweep,
)
from elastic_lm.config.cascade import DEFAULT_SCORE, Centre
from elastic_lm.config.checks import SEED, require, require_types
from elastic_lm.config.parse import load_dataclass
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.files.remote import fetched
from elastic_lm.report.machine import recorded_versions

# Both stand in files.
FORMAT = "elastic_lm routing 1"
AVERAGES = "none: averages over the validation records that chose the threshold, which are optimistic"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A member keeps a record when its score is at least the threshold; the next member gets the others.

    Raises:
      ValueError: a field is out of range.

    Example:
      ```python
      from elastic_lm.cascade import JointRule, Stage

      # The first of three members keeps what it is 90 % sure of, the second what it is half sure of.
      rule = JointRule((Stage(0.9, "max_prob"), Stage(0.5, "max_prob")))
      assert [stage.threshold for stage in rule.stages] == [0.9, 0.5]
      ```
    """

    threshold: float
    score: str = DEFAULT_SCORE  # name of the member's score (`scores.SCORES`)
    _: dataclasses.KW_ONLY
    temperature: float = 1.0  # T of the energy
    centre: Centre = "none"  # whether the energy's logits are measured from their mean

    def __post_init__(self) -> None:
        require_types(self)
        require(math.isfinite(self.threshold), "threshold", self.threshold, "must be a finite number")
        require(bool(self.score), "score", self.score, "must name a score, like energy")
        Scoring(self.temperature, self.centre)  # checks both

    @property
    def scoring(self) -> Scoring:
        """How the member's energy has to be computed."""
        return Scoring(self.temperature, self.centre)

    def check(self, scoring: Scoring | None, name: str) -> None:
        """Checks that a member's energies are those that the threshold was fitted on.

        Args:
          scoring: of the member; None = unknown, which passes.
          name: of the member, for messages.

        Raises:
          ValueError: temperature or centring differ.
        """
        if scoring is not None and "energy" in self.score:
            for field, value in dataclasses.asdict(self.scoring).items():
                own = getattr(scoring, field)
                require(own == value, f"{name}.scoring.{field}", own, f"the rule was fitted with {value!r}")


@dataclasses.dataclass(frozen=True)
class CascadeRule:
    """The Swift keeps a record when its score is at least the threshold; the Super gets the others.

    Raises:
      ValueError: a field is out of range.

    Example:
      ```python
      import pathlib
      import tempfile

      import elastic_lm as el

      rule = el.CascadeRule(1.31, "energy", temperature=2.0)  # `el.measure_cascade` fits one
      with tempfile.TemporaryDirectory() as folder:
          rule.save(pathlib.Path(folder) / "rule.json")
          assert el.CascadeRule.load(pathlib.Path(folder) / "rule.json") == rule
      ```
    """

    threshold: float
    score: str = DEFAULT_SCORE  # name of the Swift's score (`scores.SCORES`)
    _: dataclasses.KW_ONLY
    temperature: float = 1.0  # T of the energy
    centre: Centre = "none"  # whether the energy's logits are measured from their mean
    seed: int = 0  # of the score "random"
    goal: str = ""  # what the threshold was chosen for
    measured: CascadePoint | None = None  # what the threshold gave on the validation records
    guarantee: CascadeGuarantee | None = None  # what holds for new records; None = averages only
    curve: tuple[CascadePoint, ...] = ()  # other thresholds, in increasing order
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # models, data, date, versions

    def __post_init__(self) -> None:
        require_types(self)
        require(SEED[0](self.seed), "seed", self.seed, SEED[1])
        _ = self.stages  # checks the threshold and how the score is computed

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The rule as that of a cascade of any number of members: one threshold."""
        return (Stage(self.threshold, self.score, temperature=self.temperature, centre=self.centre),)

    @property
    def scoring(self) -> Scoring:
        """How the Swift's energy has to be computed."""
        return Scoring(self.temperature, self.centre)

    def check(self, scoring: Scoring | None) -> None:
        """Checks that a Swift's energies are those that the threshold was fitted on.

        Args:
          scoring: of the Swift; None = unknown, which passes.

        Raises:
          ValueError: temperature or centring differ.
        """
        self.stages[0].check(scoring, "swift")

    def save(self, path: str | Path) -> None:
        """Writes the rule as JSON; a crash never leaves half a file."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_text_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "CascadeRule":
        """Reads a rule from its file.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not JSON, is not a cascade rule, or holds values out of range; names the
            field.
        """
        fix = "`elastic-lm cascade fit` writes one"
        return load_dataclass(cls, fetched(path), FORMAT, "cascade rule", fix)


def fit_rule(
    measurements: Measurements,
    *,
    target_accuracy: float | None = None,
    target_cost: float | None = None,
    super_accuracy: bool = False,
    risk: CascadeRisk | None = None,
    score: str = DEFAULT_SCORE,
    scoring: Scoring = PLAIN,
    seed: int = 0,
    unit: str = "flops",
    models: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, str | None] | None = None,
    contents: Mapping[str, Mapping[str, str]] | None = None,
    data: str = "",
) -> CascadeRule:
    """Chooses the threshold for one goal.

    Args:
      measurements: of validation records that both models answered.
      target_accuracy: goal: the cheapest threshold that reaches this accuracy.
      target_cost: goal: the most accurate threshold within this mean cost of a record.
      super_accuracy: goal: the cheapest threshold that is as accurate as the Super alone.
      risk: goal: the cheapest threshold that is guaranteed, for new records, to lose no more than this.
      score: name of the score that was measured; recorded.
      scoring: how the energy was computed; recorded.
      seed: decides how `risk` halves the records, and is that of the score "random"; recorded.
      unit: of the costs; recorded.
      models: descriptions of "swift" and "super"; recorded.
      fingerprints: of the checkpoints of "swift" and "super", None for a service; recorded.
      contents: of "swift" and "super", the fingerprints of their "weights" and "tokenizer", which stay when a
        model is saved again; recorded.
      data: description of the records; recorded.

    Returns:
      The rule, with its curve on these records.

    Raises:
      ValueError: not exactly one goal is given, or it is out of reach.

    Example:
      ```python
      from elastic_lm.cascade import Measurements, fit_rule

      # Four records: the Swift is right about the two that it is surest of, the Super about all.
      qualities = {"swift": [1, 1, 0, 0], "super_": [1, 1, 1, 1]}
      measurements = Measurements.of([4.0, 3.0, 2.0, 1.0], **qualities, cost_swift=1.0, cost_super=10.0)
      rule = fit_rule(measurements, super_accuracy=True)
      assert (rule.threshold, rule.measured.accuracy, rule.measured.cost) == (2.5, 1.0, 6.0)
      ```
    """
    given = one_goal(
        target_accuracy=target_accuracy,
        target_cost=target_cost,
        risk=risk,
        super_accuracy=super_accuracy or None,
    )
    curve = sweep(measurements)
    point, guarantee = _choose(measurements, curve, *given, seed)

    counts = {"rows": len(measurements), "swift": curve.swift_accuracy, "super": curve.super_accuracy}
    provenance = {
        "models": dict(models or {}),
        "fingerprints": dict(fingerprints or {}),
        "contents": {name: dict(parts) for name, parts in (contents or {}).items()},
        "data": {"description": data, **counts},
        "cost": unit,
        "guarantee": guarantee.statement if guarantee else AVERAGES,
        **when(),
    }
    return CascadeRule(
        threshold=point.threshold,
        score=score,
        **dataclasses.asdict(scoring),
        seed=seed,
        goal=goal_text(*given),
        measured=point,
        guarantee=guarantee,
        curve=curve.points(),
        provenance=provenance,
    )


def one_goal(**goals: Any) -> tuple[str, Any]:
    """(name, value) of the goal that is set.

    Args:
      **goals: by name; None = it is not set.

    Raises:
      ValueError: none is set, or several are.
    """
    given = {name: goal for name, goal in goals.items() if goal is not None}
    require(len(given) == 1, "goal", given, f"set exactly one of {', '.join(goals)}")
    return next(iter(given.items()))


def goal_text(name: str, value: Any) -> str:
    """A goal as rules record it."""
    return f"{name} {value}"


def _choose(
    measurements: Measurements, curve: CascadeCurve, goal: str, value: Any, seed: int
) -> tuple[CascadePoint, CascadeGuarantee | None]:
    """The threshold for a goal, and what is guaranteed of it."""
    if goal == "risk":
        threshold, guarantee = control(measurements, value, seed)
        return measurements.at(threshold), guarantee
    if goal == "target_accuracy":
        return cheapest(curve, value), None
    return like_super(curve) if goal == "super_accuracy" else most_accurate(curve, value), None


def when() -> dict[str, Any]:
    """Today's date, and the versions of what computed the rule."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": recorded_versions(),
    }

"""The rule of a cascade of several members: how its thresholds are fitted together, and its file.

Guarantee. The harm of thresholds t on record i is what the last member would have added,

    L_i(t) = max(q_ki - q_{m_i(t), i}, 0)

so that E accuracy(t) >= E accuracy(last member) - E L(t). A path of thresholds is chosen on one half of the
records: for each of a few harms up to the one that is allowed, the cheapest thresholds of a grid that suffer
no more on that half. The other half tests them in this order, the most cautious first, until the first that
fails (Learn then Test, arXiv 2110.01052). The order is fixed before a testing record is looked at, so that
each is tested at the full epsilon, however many thresholds were searched, and although harm need not grow
along the path. With probability at least 1 - epsilon over the testing records, all that pass have E L <= the
loss that is allowed.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elastic_lm.bounds import RUNGS
from elastic_lm.cascade.guarantee import CascadeGuarantee, CascadeRisk, halves, tested
from elastic_lm.cascade.joint import Grid, JointMeasurements, JointPoint, Thresholds, grid_of
from elastic_lm.cascade.rule import AVERAGES, CascadeRule, Stage, goal_text, one_goal, when
from elastic_lm.cascade.scores import PLAIN, Scoring
from elastic_lm.cascade.sweep import ALWAYS_SUPER, TOLERANCE
from elastic_lm.config.cascade import DEFAULT_SCORE
from elastic_lm.config.checks import SEED, require, require_type, require_types
from elastic_lm.config.parse import load_dataclass, parse_json
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.files.remote import fetched

JOINT_FORMAT = "elastic_lm joint cascade 1"  # stands in files
PATH_CELLS = 2**12  # of the grid that a path is chosen on: a finer one follows the records more closely


@dataclasses.dataclass(frozen=True)
class JointRule:
    """Thresholds of all members but the last; a record stays with the first member that reaches its own.

    Raises:
      ValueError: a field is out of range.

    Example:
      ```python
      import pathlib
      import tempfile

      from elastic_lm.cascade import JointRule, Stage, load_rule

      rule = JointRule((Stage(0.9, "max_prob"), Stage(0.5, "max_prob")))  # `fit_joint` fits one
      with tempfile.TemporaryDirectory() as folder:
          rule.save(pathlib.Path(folder) / "rule.json")
          assert load_rule(pathlib.Path(folder) / "rule.json") == rule
      ```
    """

    stages: tuple[Stage, ...]  # of every member but the last, in their order
    _: dataclasses.KW_ONLY
    seed: int = 0  # of the score "random"
    goal: str = ""  # what the thresholds were chosen for
    measured: JointPoint | None = None  # what they gave on the validation records
    guarantee: CascadeGuarantee | None = None  # what holds for new records; None = averages only
    curve: tuple[JointPoint, ...] = ()  # the best accuracy for each cost, by cost
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # models, data, date, versions

    def __post_init__(self) -> None:
        require_types(self)
        require(len(self.stages) >= 1, "stages", self.stages, "needs one for each member but the last")
        require(SEED[0](self.seed), "seed", self.seed, SEED[1])

    @property
    def thresholds(self) -> Thresholds:
        """Of every member but the last."""
        return tuple(stage.threshold for stage in self.stages)

    def save(self, path: str | Path) -> None:
        """Writes the rule as JSON; a crash never leaves half a file."""
        content = {"format": JOINT_FORMAT, **dataclasses.asdict(self)}
        write_text_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "JointRule":
        """Reads a rule from its file.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not JSON, is no rule of several members, or holds values out of range; names
            the field.
        """
        fix = "`elastic-lm cascade fit --between ...` writes one"
        return load_dataclass(cls, fetched(path), JOINT_FORMAT, "rule of several members", fix)


def load_rule(path: str | Path) -> CascadeRule | JointRule:
    """Reads the rule of a cascade of two members or of more, by what its file says.

    Args:
      path: a file that `CascadeRule.save` or `JointRule.save` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no rule; names the field.

    Example:
      ```python
      import pathlib
      import tempfile

      import elastic_lm as el
      from elastic_lm.cascade import load_rule

      with tempfile.TemporaryDirectory() as folder:
          el.CascadeRule(0.9, "max_prob").save(pathlib.Path(folder) / "rule.json")
          assert load_rule(pathlib.Path(folder) / "rule.json").threshold == 0.9
      ```
    """
    place = fetched(path)
    try:
        content = parse_json(place.read_text(encoding="utf-8")) if place.is_file() else {}
        joint = isinstance(content, dict) and content.get("format") == JOINT_FORMAT
    except ValueError:  # is reported below
        joint = False
    return JointRule.load(path) if joint else CascadeRule.load(path)


def fit_joint(
    measured: JointMeasurements,
    *,
    target_accuracy: float | None = None,
    target_cost: float | None = None,
    super_accuracy: bool = False,
    risk: CascadeRisk | None = None,
    scores: Sequence[str] | str = DEFAULT_SCORE,
    scorings: Sequence[Scoring] | Scoring = PLAIN,
    seed: int = 0,
    unit: str = "flops",
    models: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, str | None] | None = None,
    contents: Mapping[str, Mapping[str, str]] | None = None,
    data: str = "",
) -> JointRule:
    """Chooses the thresholds of all members together, for one goal.

    Args:
      measured: of validation records that all members answered.
      target_accuracy: goal: the cheapest thresholds that reach this accuracy.
      target_cost: goal: the most accurate thresholds within this mean cost of a record.
      super_accuracy: goal: the cheapest thresholds that are as accurate as the last member alone.
      risk: goal: the cheapest thresholds that are guaranteed, for new records, to lose no more than this
        against the last member alone.
      scores: names of the scores that were measured, of each member but the last, or one for all; recorded.
      scorings: how their energies were computed, or one for all; recorded.
      seed: decides how `risk` halves the records, and is that of the score "random"; recorded.
      unit: of the costs; recorded.
      models: descriptions of the members; recorded.
      fingerprints: of their checkpoints, None for a service; recorded.
      contents: fingerprints of their weights and tokenizers; recorded.
      data: description of the records; recorded.

    Returns:
      The rule, with the best accuracy for each cost on these records as its curve.

    Raises:
      ValueError: not exactly one goal is given, or it is out of reach.

    Example:
      ```python
      import numpy as np
      from elastic_lm.cascade import CascadeRisk, JointMeasurements, fit_joint

      # Of 1,000 records the first member knows the half that it is surest of, the second three quarters.
      sure = np.linspace(0, 1, 1000)
      measured = JointMeasurements.of(
          scores=[sure, sure], qualities=[sure > 0.5, sure > 0.25, sure >= 0], costs=[1.0, 5.0, 50.0]
      )
      rule = fit_joint(measured, risk=CascadeRisk(loss=0.05))
      assert rule.guarantee.achieved
      assert rule.measured.cost < 20
      ```
    """
    goal, value = one_goal(
        target_accuracy=target_accuracy,
        target_cost=target_cost,
        risk=risk,
        super_accuracy=super_accuracy or None,
    )
    k, grid = measured.members, grid_of(measured)
    for name, given in (("scores", scores), ("scorings", scorings)):
        if not isinstance(given, str | Scoring):
            require(
                len(given) == k - 1,
                f"{name}: count",
                len(given),
                f"give one for each of {k - 1} members, or one for all",
            )
    if isinstance(value, int | float) and not isinstance(value, bool):
        require(math.isfinite(value), goal, value, "must be a finite number")
    elif goal in ("target_accuracy", "target_cost"):
        require_type(goal, value, float)
    guarantee = None
    if isinstance(value, CascadeRisk):
        thresholds, guarantee = control_jointly(measured, value, seed)
    else:
        thresholds = _best(measured, grid, goal, value)

    names = [scores] * (k - 1) if isinstance(scores, str) else list(scores)
    own = [scorings] * (k - 1) if isinstance(scorings, Scoring) else list(scorings)
    alone = [float(row.mean()) for row in measured.qualities]
    counts = {"rows": len(measured), "swift": alone[0], "super": alone[-1], "members": alone}
    provenance = {
        "models": dict(models or {}),
        "fingerprints": dict(fingerprints or {}),
        "contents": {name: dict(parts) for name, parts in (contents or {}).items()},
        "data": {"description": data, **counts},
        "cost": unit,
        "guarantee": guarantee.statement if guarantee else AVERAGES,
        **when(),
    }
    return JointRule(
        stages=tuple(
            Stage(threshold, name, temperature=scoring.temperature, centre=scoring.centre)
            for threshold, name, scoring in zip(thresholds, names, own, strict=True)
        ),
        seed=seed,
        goal=goal_text(goal, value),
        measured=measured.at(thresholds),
        guarantee=guarantee,
        curve=tuple(measured.at(grid.at(cell)) for cell in grid.front()),
        provenance=provenance,
    )


def _best(measured: JointMeasurements, grid: Grid, goal: str, value: Any) -> Thresholds:
    """The thresholds for a goal without a guarantee.

    Raises:
      ValueError: it is out of reach; says what the best ones give.
    """
    last = float(measured.qualities[-1].mean())
    if goal == "target_cost":
        within = grid.cost <= value * (1 + TOLERANCE)
        if not within.any():
            raise ValueError(
                f"target_cost={value!r}: the first member alone costs {grid.cost.min():.6g}: raise it, or "
                "take a smaller one"
            )
        best = np.max(grid.accuracy[within])
        cell = grid.cheapest(within & (grid.accuracy >= best - TOLERANCE))
    else:
        target = last if goal == "super_accuracy" else value
        cell = grid.cheapest(grid.accuracy >= target - TOLERANCE)
        if cell is None:
            raise ValueError(
                f"target_accuracy={target!r}: no thresholds reach it on these {len(measured)} records; the "
                f"best give {grid.accuracy.max():.6g} (last member alone {last:.6g}): lower it, or take a "
                "better last member"
            )
    assert cell is not None
    return grid.at(cell)


def control_jointly(
    measured: JointMeasurements, stated: CascadeRisk, seed: int = 0
) -> tuple[Thresholds, CascadeGuarantee]:
    """Finds the least cautious thresholds of a path that pass.

    Args:
      measured: of independent validation records.
      stated: what is to be guaranteed.
      seed: decides which half of the records chooses the path.

    Returns:
      (thresholds, the guarantee). Where nothing passes, every record goes to the last member.

    Raises:
      ValueError: there are fewer than two records.
    """
    selection, testing = (measured.take(half) for half in halves(len(measured), seed))
    harm, every = testing.harm(), np.arange(len(testing))
    return tested(
        path(selection, stated.loss),
        lambda thresholds: harm[testing.answered_by(thresholds), every],
        stated,
        len(testing),
        otherwise=(ALWAYS_SUPER,) * (measured.members - 1),
    )


def path(measured: JointMeasurements, loss: float, rungs: int = RUNGS) -> list[Thresholds]:
    """Thresholds to test, from the most to the least cautious.

    Args:
      measured: of records that do not test.
      loss: harm that is allowed.
      rungs: how many harms on these records, evenly spaced up to `loss`, to find the cheapest thresholds for.

    Returns:
      Distinct thresholds without those that keep no record.
    """
    grid, found = grid_of(measured, PATH_CELLS), []
    for i in range(rungs):
        cell = grid.cheapest(grid.harm <= loss * (i + 1) / rungs + TOLERANCE)
        assert cell is not None  # the last member alone does no harm
        thresholds = grid.at(cell)
        keeps_some = any(threshold < ALWAYS_SUPER for threshold in thresholds)
        if keeps_some and thresholds not in found:
            found.append(thresholds)
    return found

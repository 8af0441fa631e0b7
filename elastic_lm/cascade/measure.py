"""What a Swift and a Super give for labelled rows, from which thresholds between them are chosen."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import numpy as np

from elastic_lm.cascade.answerer import Answer, Answerer, Record, previewing
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.rule import CascadeRule, fit_rule
from elastic_lm.cascade.scores import PLAIN, Scoring
from elastic_lm.cascade.sweep import ALWAYS_SUPER, Measured
from elastic_lm.config.cascade import DEFAULT_SCORE, CostUnit
from elastic_lm.config.checks import require, require_choice


@dataclasses.dataclass(frozen=True)
class MeasuredPair:
    """Labelled rows that both models answered, and what was measured of them."""

    rows: Measured
    score: str  # that is in rows.scores
    scoring: Scoring  # of the Swift's energy
    seed: int  # of the score "random"
    unit: CostUnit  # of the costs

    def fit(self, **goal: Any) -> CascadeRule:
        """Chooses a threshold.

        Args:
          **goal: one of target_accuracy, target_cost, super_accuracy and risk, and what else is to be
            recorded: see `routing_rule.fit_rule`.

        Returns:
          The rule of this score.

        Raises:
          ValueError: not exactly one goal is given, or it is out of reach.
        """
        about: dict[str, Any] = {"score": self.score, "scoring": self.scoring, "unit": self.unit}
        return fit_rule(self.rows, **about, seed=self.seed, **goal)


def measure_cascade(
    swift: Answerer,
    super_: Answerer,
    rows: Iterable[Record],
    quality: Callable[[Record, Any], float],
    *,
    score: str = DEFAULT_SCORE,
    seed: int = 0,
    cost: CostUnit = "flops",
    batch_size: int = 16,
) -> MeasuredPair:
    """Both models answer every row; `MeasuredPair.fit` chooses a threshold on the result.

    A Super that `Resumes` goes on from the Swift's states, and its cost is that of the rest.

    Args:
      swift: the small model.
      super_: the large one.
      rows: with whatever `quality` reads; not those that a model was trained on.
      quality: of an output to a row, in [0, 1]: whether it is right.
      score: of the Swift, see `calibrate.routing_scores`.
      seed: of the score "random".
      cost: of a row: FLOPs, or the median seconds of all rows.
      batch_size: rows that are read at once.

    Returns:
      What thresholds are chosen on. Rows that a model failed on are left out, with a warning.

    Raises:
      ValueError: the Swift has no such score, every row failed, or nobody knows what the Super costs.
    """
    require_choice("cost", cost, get_args(CostUnit))
    rows = list(rows)
    scoring = getattr(swift, "scoring", PLAIN)
    rule = CascadeRule(ALWAYS_SUPER, score, scoring.temperature, scoring.centre, seed)
    results = Cascade(swift, super_, rule, batch_size=batch_size, preview=False).answer(rows)
    errors = [error for r in results if (error := r.swift.error or r.error) is not None]
    good = [r for r in results if r.swift.error is None and r.error is None]
    if errors:
        require(bool(good), "rows", len(rows), f"every row failed, the first with: {errors[0]}")
        warnings.warn(f"{len(errors)} of {len(rows)} rows failed and are left out: {errors[0]}", stacklevel=2)
    swifts, supers = [r.swift for r in good], [r.answer for r in good]
    known, kept = swift_costs(swifts, cost, previewing(swift, score) is not None)
    dear = costs_of(supers, cost)
    fix = "the Super's answers have none; give its answerer a cost, or measure cost='seconds'"
    require(bool(np.any(dear > 0)), "cost", cost, fix)
    measured = Measured.of(
        [np.nan if r.score is None else r.score for r in good],
        [quality(rows[r.index], r.swift.output) for r in good],
        [quality(rows[r.index], r.output) for r in good],
        known,
        dear,
        kept,
    )
    return MeasuredPair(measured, score, scoring, seed, cost)


def swift_costs(answers: Sequence[Answer], unit: CostUnit, previewed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Costs until a Swift's score is known, and of what it does afterwards.

    Args:
      answers: of the Swift.
      unit: of the costs.
      previewed: the Swift knows its score before it answers.
    """
    whole = costs_of(answers, unit)
    known = costs_of([answer.preview or answer for answer in answers], unit) if previewed else whole
    return known, whole - known


def costs_of(answers: Sequence[Answer], unit: CostUnit) -> np.ndarray:
    """[N] FLOPs, or the one median of seconds, which compilation does not move."""
    if unit == "seconds":
        return np.asarray(np.median([answer.seconds for answer in answers]))
    return np.asarray([answer.cost for answer in answers])

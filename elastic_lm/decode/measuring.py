"""What a Swift and a Super give for labelled rows, from which thresholds between them are chosen."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from elastic_lm.calibrate.routing import ALWAYS_SUPER, Measured
from elastic_lm.calibrate.routing_rule import RoutingRule
from elastic_lm.calibrate.routing_scores import PLAIN
from elastic_lm.decode.answerers import Answer, Answerer, Row, previewing
from elastic_lm.decode.cascade import Cascade
from elastic_lm.plain import require


def measure_routing(
    swift: Answerer,
    super_: Answerer,
    rows: Sequence[Row],
    quality: Callable[[Row, Any], float],
    *,
    score: str = "energy",
    seed: int = 0,
    cost: Literal["flops", "seconds"] = "flops",
    batch_size: int = 16,
) -> Measured:
    """Both models answer every row; `fit_routing` chooses a threshold on the result.

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

    Raises:
      ValueError: the Swift has no such score, or every row failed. Rows that a model failed on are left
        out, with a warning.
    """
    scoring = getattr(swift, "scoring", PLAIN)
    rule = RoutingRule(ALWAYS_SUPER, score, scoring.temperature, scoring.centre, seed)
    results = Cascade(swift, super_, rule, batch_size=batch_size, preview=False).answer(rows)
    errors = [error for r in results if (error := r.swift.error or r.error) is not None]
    good = [r for r in results if r.swift.error is None and r.error is None]
    if errors:
        require(bool(good), "rows", len(rows), f"every row failed, the first with: {errors[0]}")
        warnings.warn(f"{len(errors)} of {len(rows)} rows failed and are left out: {errors[0]}", stacklevel=2)
    swifts, supers = [r.swift for r in good], [r.answer for r in good]
    whole = known = costs_of(swifts, cost)
    if previewing(swift, score) is not None:
        known = costs_of([answer.preview or answer for answer in swifts], cost)
    return Measured.of(
        [np.nan if r.score is None else r.score for r in good],
        [quality(rows[r.index], r.swift.output) for r in good],
        [quality(rows[r.index], r.output) for r in good],
        known,
        costs_of(supers, cost),
        whole - known,
    )


def costs_of(answers: Sequence[Answer], unit: Literal["flops", "seconds"]) -> np.ndarray:
    """[N] FLOPs, or the one median of seconds, which compilation does not move."""
    if unit == "seconds":
        return np.asarray(np.median([answer.seconds for answer in answers]))
    return np.asarray([answer.cost for answer in answers])

"""Lines of the files that `elastic-lm cascade` writes, and what is measured on those of labelled records."""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elastic_lm.cascade.answerer import Answer, Record
from elastic_lm.cascade.joint import JointMeasurements
from elastic_lm.cascade.measure import answer_costs, swift_costs
from elastic_lm.cascade.results import CascadeResult
from elastic_lm.cascade.scores import score_of
from elastic_lm.cascade.sweep import Measurements
from elastic_lm.cli.cascade.fit import Options
from elastic_lm.cli.cascade.quality import Names, choice_of, named, quality
from elastic_lm.config.checks import require

Answers = tuple[Answer, ...]  # of all members to a record, from the Swift to the Super
UNNAMED: Names = {}


def result_line(result: CascadeResult, names: Names = UNNAMED) -> dict[str, Any]:
    """A result as a line of an output.

    Args:
      result: of one record.
      names: of the models' classes, which are written instead of their indices.
    """
    score = None if result.score is None or math.isnan(result.score) else result.score
    line = {"index": result.index, "output": named(result.output, result.model, names)}
    line |= {"model": result.model, "score": score, "cost": result.cost}
    if result.error is not None:
        member = list(names)[result.fallback_member or 0] if names else ""
        line |= {"error": result.error, "fallback": named(result.fallback, member, names)}
    return line


def answers_line(result: CascadeResult) -> dict[str, Any]:
    """All models' answers to a record as a line; `answers_of` reads it."""
    line = {"index": result.index, "swift": _values(result.swift), "super": _values(result.answer)}
    if result.between:
        line["between"] = [_values(answer) for answer in result.between]
    error = next((answer.error for answer in result.answers if answer.error is not None), None)
    return line if error is None else {**line, "error": error}


def answers_of(line: Mapping[str, Any]) -> Answers:
    """The answers that `answers_line` wrote, from the Swift's to the Super's."""
    return tuple(map(_answer, (line["swift"], *line.get("between", ()), line["super"])))


def _values(answer: Answer) -> dict[str, Any]:
    values = {name: getattr(answer, name) for name in ("output", "scores", "cost", "seconds", "error")}
    return values if answer.preview is None else {**values, "preview": _values(answer.preview)}


def _answer(values: Mapping[str, Any]) -> Answer:
    preview = values.get("preview")
    return Answer(**{**values, "preview": preview and _answer(preview)})


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Labelled records that all models answered.

    Attributes:
      index: numbers of the records, N of them; others failed.
      measured: what the thresholds are chosen on.
      same: [k, N] bool, whether a member's answer is that of the last.
    """

    index: Sequence[int]
    measured: JointMeasurements
    same: np.ndarray

    @property
    def pair(self) -> Measurements:
        """What was measured, of two models."""
        m = self.measured
        return Measurements.of(m.scores[0], *m.qualities, *m.costs, cost_kept=m.kept[0])


def measured_of(
    answered: Sequence[Answers],
    records: Sequence[Record],
    right: Sequence[Sequence[Any]] | None,
    names: Names,
    options: Options,
    *,
    previewed: Sequence[bool],
) -> Labelled:
    """What all models gave for labelled records.

    Records that a model failed on are left out, with a note on stderr.

    Args:
      answered: answers to the records.
      records: the records.
      right: from `right_answers`; None = what the last model answers is right.
      names: from `class_names`.
      options: of the command.
      previewed: of every model but the last, whether it knows its score before it answers.

    Raises:
      ValueError: no record is left, or costs are asked for that nobody knows.
    """
    good = [i for i, answers in enumerate(answered) if all(a.error is None for a in answers)]
    if len(good) < len(answered):
        first = next(a.error for answers in answered for a in answers if a.error is not None)
        fix = "--retry-failed answers them again"
        require(bool(good), "records", len(answered), f"every record failed, the first with: {first}; {fix}")
        count = len(answered) - len(good)
        print(f"{count} of {len(answered)} records failed and are left out ({fix}): {first}", file=sys.stderr)
    columns = list(zip(*(answered[i] for i in good), strict=True))

    def outputs(model: str, answers: Sequence[Answer]) -> list[Any]:
        found = []
        for i, answer in zip(good, answers, strict=True):
            output, choices = named(answer.output, model, names), records[i].get(options.choices_field)
            # A choice may be named by its number or letter; labels were turned into texts.
            if choices is not None and not any(names.values()) and options.tolerance is None:
                output = (choice_of(output, choices) or ("", output))[1]
            found.append(output)
        return found

    given = [outputs(name, answers) for name, answers in zip(options.names, columns, strict=True)]
    of_last = [[output] for output in given[-1]]
    wanted = of_last if right is None else [right[i] for i in good]

    def compared(own: Sequence[Any], others: Sequence[Sequence[Any]]) -> list[float]:
        pairs = zip(own, others, strict=True)
        return [quality(output, other, options.tolerance) for output, other in pairs]

    costs = [swift_costs(a, options.cost, p) for a, p in zip(columns, previewed, strict=False)]
    scores = [
        [score_of(a.scores, name, options.seed + m, i, member) for i, a in zip(good, answers, strict=True)]
        for m, (member, name, answers) in enumerate(
            zip(options.names, options.scored_by, columns, strict=False)
        )
    ]
    measured = JointMeasurements.of(
        scores=scores,
        qualities=[compared(own, wanted) for own in given],
        costs=[*(known for known, _ in costs), check_costs(columns[-1], options)],
        kept=[kept for _, kept in costs],
    )
    same = np.asarray([compared(own, of_last) for own in given]) == 1.0
    return Labelled(good, measured, same)


def check_costs(answers: Sequence[Answer], options: Options) -> np.ndarray:
    """Costs of the Super's answers; where a service does not say them they are --super-cost.

    Raises:
      ValueError: nobody knows them.
    """
    if options.cost == "seconds":
        return answer_costs(answers, options.cost)
    costs = [answer.cost or options.super_cost for answer in answers]
    if not any(costs):
        raise ValueError(options.cost_is_missing())
    return np.asarray(costs)

"""Lines of the files that `elastic-lm cascade` writes, and what is measured on those of labelled records."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elastic_lm.cascade.answerer import Answer, Record
from elastic_lm.cascade.measure import answer_costs, swift_costs
from elastic_lm.cascade.results import CascadeResult
from elastic_lm.cascade.scores import score_of
from elastic_lm.cascade.sweep import Measurements
from elastic_lm.cli.cascade.fit import Options
from elastic_lm.cli.cascade.quality import Names, choice_of, named, quality
from elastic_lm.config.checks import require

Pair = tuple[Answer, Answer]  # of the Swift, of the Super
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
        line |= {"error": result.error, "fallback": named(result.fallback, "swift", names)}
    return line


def answers_line(result: CascadeResult) -> dict[str, Any]:
    """Both models' answers to a record as a line; `answers_of` reads it."""
    line = {"index": result.index, "swift": _values(result.swift), "super": _values(result.answer)}
    error = result.swift.error or result.error
    return line if error is None else {**line, "error": error}


def answers_of(line: Mapping[str, Any]) -> Pair:
    """The answers of the Swift and of the Super that `answers_line` wrote."""
    return _answer(line["swift"]), _answer(line["super"])


def _values(answer: Answer) -> dict[str, Any]:
    values = {name: getattr(answer, name) for name in ("output", "scores", "cost", "seconds", "error")}
    return values if answer.preview is None else {**values, "preview": _values(answer.preview)}


def _answer(values: Mapping[str, Any]) -> Answer:
    preview = values.get("preview")
    return Answer(**{**values, "preview": preview and _answer(preview)})


def measured_of(
    pairs: Sequence[Pair],
    records: Sequence[Record],
    right: Sequence[Sequence[Any]],
    names: Names,
    options: Options,
    *,
    previewed: bool,
) -> Measurements:
    """What both models gave for labelled records.

    Records that a model failed on are left out, with a note on stderr.

    Args:
      pairs: answers to the records.
      records: the records.
      right: from `right_answers`.
      names: from `class_names`.
      options: of the command.
      previewed: the Swift knows its score before it answers.

    Raises:
      ValueError: no record is left, or costs are asked for that nobody knows.
    """
    good = [i for i, pair in enumerate(pairs) if all(answer.error is None for answer in pair)]
    if len(good) < len(pairs):
        first = next(answer.error for pair in pairs for answer in pair if answer.error is not None)
        fix = "--retry-failed answers them again"
        require(bool(good), "records", len(pairs), f"every record failed, the first with: {first}; {fix}")
        count = len(pairs) - len(good)
        print(f"{count} of {len(pairs)} records failed and are left out ({fix}): {first}", file=sys.stderr)
    swift, super_ = ([pairs[i][model] for i in good] for model in (0, 1))

    def qualities(model: str, answers: list[Answer]) -> list[float]:
        found = []
        for i, answer in zip(good, answers, strict=True):
            output, choices = named(answer.output, model, names), records[i].get(options.choices_field)
            # A choice may be named by its number or letter; labels were turned into texts.
            if choices is not None and not any(names.values()) and options.tolerance is None:
                output = (choice_of(output, choices) or ("", output))[1]
            found.append(quality(output, right[i], options.tolerance))
        return found

    score = options.scored_by
    cost_swift, cost_kept = swift_costs(swift, options.cost, previewed)
    return Measurements.of(
        scores=[score_of(a.scores, score, options.seed, i) for i, a in zip(good, swift, strict=True)],
        swift=qualities("swift", swift),
        super_=qualities("super", super_),
        cost_swift=cost_swift,
        cost_super=check_costs(super_, options),
        cost_kept=cost_kept,
    )


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

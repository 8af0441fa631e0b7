"""Lines of the files that `elastic-lm route` writes, and what is measured on those of labelled rows."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elastic_lm.cascade.answerer import Answer, Record
from elastic_lm.cascade.measure import costs_of, swift_costs
from elastic_lm.cascade.results import CascadeResult
from elastic_lm.cascade.scores import score_of
from elastic_lm.cascade.sweep import Measured
from elastic_lm.cli.cascade.checks import cost_is_missing
from elastic_lm.cli.cascade.quality import Names, choice_of, named, quality
from elastic_lm.config.checks import require

Pair = tuple[Answer, Answer]  # of the Swift, of the Super
UNNAMED: Names = {}


def record(result: CascadeResult, names: Names = UNNAMED) -> dict[str, Any]:
    """A result as a line of an output.

    Args:
      result: of one row.
      names: of the models' classes, which are written instead of their indices.
    """
    score = None if result.score is None or math.isnan(result.score) else result.score
    line = {"index": result.index, "output": named(result.output, result.model, names)}
    line |= {"model": result.model, "score": score, "cost": result.cost}
    if result.error is not None:
        line |= {"error": result.error, "fallback": named(result.fallback, "swift", names)}
    return line


def answers_line(result: CascadeResult) -> dict[str, Any]:
    """Both models' answers to a row as a line; `answers_of` reads it."""
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
    rows: Sequence[Record],
    right: Sequence[Sequence[Any]],
    names: Names,
    args: argparse.Namespace,
    score: str,
    previewed: bool,
) -> Measured:
    """What both models gave for labelled rows; those that one failed on are left out, and counted aloud.

    Args:
      pairs: answers to the rows.
      rows: the rows.
      right: from `right_answers`.
      names: from `class_names`.
      args: flags of `routing.flags`.
      score: that is read of the Swift.
      previewed: the Swift knows it before it answers.

    Raises:
      ValueError: no row is left, or costs are asked for that nobody knows.
    """
    errors = [error for pair in pairs for answer in pair if (error := answer.error) is not None]
    good = [i for i, pair in enumerate(pairs) if all(answer.error is None for answer in pair)]
    if len(good) < len(pairs):
        count = len(pairs) - len(good)
        fix = "--retry-failed answers them again"
        require(bool(good), "rows", len(pairs), f"every row failed, the first with: {errors[0]}; {fix}")
        print(f"{count} of {len(pairs)} rows failed and are left out ({fix}): {errors[0]}", file=sys.stderr)
    swift, super_ = ([pairs[i][model] for i in good] for model in (0, 1))

    def qualities(model: str, answers: list[Answer]) -> list[float]:
        found = []
        for i, answer in zip(good, answers, strict=True):
            output, choices = named(answer.output, model, names), rows[i].get(args.choices_field)
            if choices is not None and not any(names.values()) and args.tolerance is None:
                output = (choice_of(output, choices) or ("", output))[1]
            found.append(quality(output, right[i], args.tolerance))
        return found

    known, kept = swift_costs(swift, args.cost, previewed)
    return Measured.of(
        [score_of(a.scores, score, args.seed, i) for i, a in zip(good, swift, strict=True)],
        qualities("swift", swift),
        qualities("super", super_),
        known,
        check_costs(super_, args),
        kept,
    )


def check_costs(answers: Sequence[Answer], args: argparse.Namespace) -> np.ndarray:
    """Costs of the Super's answers; those that a service does not tell are --super-cost.

    Raises:
      ValueError: nobody knows them.
    """
    if args.cost == "seconds":
        return costs_of(answers, args.cost)
    costs = [answer.cost or args.super_cost for answer in answers]
    if not any(costs):
        raise ValueError(cost_is_missing(args))
    return np.asarray(costs)

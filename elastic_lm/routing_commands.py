"""`elastic-lm route`: fits a rule on labelled rows, and answers files of rows by one."""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elastic_lm.calibrate.routing import ALWAYS_SUPER, Measured
from elastic_lm.calibrate.routing_risk import RoutingRisk
from elastic_lm.calibrate.routing_rule import RoutingRule, fit
from elastic_lm.calibrate.routing_scores import Scoring, score_of
from elastic_lm.decode.answerers import Answer, Answerer, Row, previewing
from elastic_lm.decode.cascade import Cascade
from elastic_lm.decode.routing_results import Routed, Statistics
from elastic_lm.generation import prepare_output
from elastic_lm.jsonl import Journal, count_rows, read_rows
from elastic_lm.metrics import ProgressWriter
from elastic_lm.plain import require
from elastic_lm.routing_models import is_url, make_pair

PROGRESS_SECONDS = 5.0  # between lines of progress


def run(args: argparse.Namespace) -> None:
    """Runs `elastic-lm route fit` or `elastic-lm route run`."""
    {"fit": fit_command, "run": run_command}[args.action](args)


def fit_command(args: argparse.Namespace) -> None:
    """Both models answer labelled rows; a threshold is chosen, printed and written."""
    if args.epsilon is not None and args.risk is None:
        raise ValueError(f"--epsilon {args.epsilon}: is part of a guarantee; give --risk too")
    for path in (args.out, args.plot):
        prepare_output(path)
    rows = list(read_rows(args.data))
    require(bool(rows), "--data", args.data, "holds no row")
    _check_labels(rows, args)
    scoring = Scoring(1.0 if args.temperature is None else args.temperature, args.centre or "none")
    score = args.score or "energy"
    swift, super_ = make_pair(args, rows[0], scoring, score)
    rule = _always_super(score, scoring, args.seed)
    cascade = Cascade(swift, super_, rule, batch_size=args.batch_size, preview=False)
    results = _watched(cascade, rows, len(rows))
    risk = None if args.risk is None else RoutingRisk(args.risk, args.epsilon or 0.05)
    rule = fit(
        measured(results, rows, (swift, super_), args, score),
        target_accuracy=args.target_accuracy,
        target_cost=args.target_cost,
        super_accuracy=args.super_accuracy,
        risk=risk,
        score=score,
        scoring=scoring,
        seed=args.seed,
        unit=args.cost,
        models={"swift": _swift_name(args), "super": args.super_},
        data=args.data,
    )
    rule.save(args.out)
    print(table(rule))
    if args.plot:
        from elastic_lm.evaluate.plots import routing

        routing(rule.curve, rule.measured, args.plot, unit=args.cost)
    print(f"written to {args.out}", file=sys.stderr)


def _always_super(score: str, scoring: Scoring, seed: int) -> RoutingRule:
    """A rule by which both models answer every row."""
    return RoutingRule(ALWAYS_SUPER, score, scoring.temperature, scoring.centre, seed)


def _check_labels(rows: Sequence[Row], args: argparse.Namespace) -> None:
    for number, row in enumerate(rows, 1):
        if args.label_field not in row:
            fix = f"--label-field names the right answer; the row has {', '.join(row)}"
            raise ValueError(f"{args.data} row {number}: no {args.label_field!r}: {fix}")


def measured(
    results: Sequence[Routed],
    rows: Sequence[Row],
    models: tuple[Answerer, Answerer],
    args: argparse.Namespace,
    score: str,
) -> Measured:
    """What both models gave for labelled rows; those that one failed on are left out, and counted aloud.

    Raises:
      ValueError: none is left, or costs are asked for that nobody knows.
    """
    errors = [error for r in results if (error := r.error or r.swift.error) is not None]
    good = [r for r in results if r.error is None and r.swift.error is None]
    if errors:
        print(f"{len(errors)} of {len(results)} rows failed and are left out: {errors[0]}", file=sys.stderr)
    if not good:
        raise ValueError(f"every row failed, the first with: {errors[0]}")
    labels = [rows[r.index][args.label_field] for r in good]
    names = [getattr(model, "names", ()) for model in models]

    def qualities(answers: list[Answer], names: Sequence[str]) -> list[float]:
        triples = zip(answers, labels, good, strict=True)
        return [
            quality(a.output, label, names or rows[r.index].get(args.choices_field, ()), args.tolerance)
            for a, label, r in triples
        ]

    swift, super_ = [r.swift for r in good], [r.answer for r in good]
    whole = known = _costs(swift, args, "swift")
    if previewing(models[0], score):
        known = _costs([a.preview for a in swift if a.preview is not None], args, "swift")
    return Measured.of(
        [score_of(r.swift.scores, score, args.seed, r.index) for r in good],
        qualities(swift, names[0]),
        qualities(super_, names[1]),
        known,
        _costs(super_, args, "super"),
        whole - known,
    )


def _costs(answers: list[Answer], args: argparse.Namespace, model: str) -> np.ndarray:
    """Of every row: FLOPs, or the median seconds, which compilation does not move."""
    if args.cost == "seconds":
        return np.asarray(np.median([answer.seconds for answer in answers]))
    costs = [answer.cost for answer in answers]
    if not any(costs) and model == "super":
        fix = "the service does not say what a row costs; give it, or --cost seconds"
        raise ValueError(f"--super-cost {args.super_cost:g}: {fix}")
    return np.asarray(costs)


def quality(output: Any, label: Any, names: Sequence[str], tolerance: float | None) -> float:
    """1 where an answer is right, else 0.

    Args:
      output: index, number or text.
      label: what is right: likewise, the name of an index, or a list of which any is right.
      names: of indices.
      tolerance: numbers this far from the label are right; None = they have to be whole and equal.

    Raises:
      ValueError: a number that is not whole is compared without a tolerance.
    """
    if isinstance(label, list):
        return max((quality(output, one, names, tolerance) for one in label), default=0.0)
    if isinstance(output, int) and isinstance(label, str):
        output = names[output] if output < len(names) else output
    if tolerance is not None:
        return float(abs(float(output) - float(label)) <= tolerance)
    fix = "is no class; say with --tolerance how close to the label is right"
    require(not isinstance(output, float) or output.is_integer(), "answer", output, fix)
    if isinstance(output, str):
        return float(output.strip() == str(label).strip())
    return float(output == label)


def table(rule: RoutingRule) -> str:
    """Some of a rule's curve, and what was chosen."""
    assert rule.measured is not None
    unit, data = rule.provenance["cost"], rule.provenance["data"]
    lines = [f"{rule.score} threshold   to Super   accuracy   mean {unit} per row"]
    spread = rule.curve[:: max(1, len(rule.curve) // 10)]
    for point in sorted({*spread, rule.curve[-1], rule.measured}, key=lambda p: p.threshold):
        shown = f"{point.threshold:.6g}" if abs(point.threshold) < ALWAYS_SUPER else "all"
        mark = " *" if point == rule.measured else ""
        numbers = f"{point.share_super:>10.2%} {point.accuracy:>10.4f} {point.cost:>14.4g}"
        lines.append(f"{shown:>16} {numbers}{mark}")
    lines.append(f"{data['rows']} rows: Swift alone {data['swift']:.4f}, Super alone {data['super']:.4f}")
    if rule.guarantee:
        start = "guaranteed: " if rule.guarantee.achieved else ""
        lines.append(start + rule.guarantee.statement)
    return "\n".join(lines)


def run_command(args: argparse.Namespace) -> None:
    """Answers a file of rows, or goes on with it."""
    rule = _rule(args)
    first = next(read_rows(args.data), None)
    require(first is not None, "--data", args.data, "holds no row")
    assert first is not None
    settings = {
        "swift": _swift_name(args),
        "super": args.super_,
        "data": args.data,
        "score": rule.score,
        "threshold": rule.threshold,
        "temperature": rule.temperature,
        "centre": rule.centre,
        "seed": rule.seed,
    }
    _warn(rule, settings)
    journal = Journal(args.out, settings)
    try:
        cascade = Cascade(*make_pair(args, first, rule.scoring, rule.score), rule, batch_size=args.batch_size)
        statistics = route(cascade, read_rows(args.data), journal, count_rows(args.data))
    finally:
        journal.close()
    print(statistics.text())
    print(f"written to {args.out}", file=sys.stderr)


def _rule(args: argparse.Namespace) -> RoutingRule:
    """The rule of --rule, or of --threshold."""
    given = [name for name in ("score", "temperature", "centre") if getattr(args, name) is not None]
    if (args.rule is None) == (args.threshold is None):
        raise ValueError(f"--rule {args.rule}, --threshold {args.threshold}: give one of them")
    if args.rule is None:
        own = {name: getattr(args, name) for name in given}
        return RoutingRule(args.threshold, **{"score": "energy", **own}, seed=args.seed)
    if given:
        raise ValueError(f"--{given[0]} {getattr(args, given[0])}: is settled by --rule; leave it out")
    return RoutingRule.load(args.rule)


def _swift_name(args: argparse.Namespace) -> str:
    return args.swift if args.swift_exit is None else f"{args.super_} exit {args.swift_exit}"


def _warn(rule: RoutingRule, settings: dict[str, Any]) -> None:
    """Says where the rule was fitted on other models."""
    for name, fitted in rule.provenance.get("models", {}).items():
        now = settings[name]
        if now != fitted and not is_url(now) and Path(now).absolute() != Path(fitted).absolute():
            print(f"the rule was fitted with {name} {fitted}, this is {now}: fit it again", file=sys.stderr)


def route(cascade: Cascade, rows: Iterable[Row], journal: Journal, total: int) -> Statistics:
    """Answers the rows that a journal does not hold yet.

    Args:
      cascade: who answers.
      rows: all rows, from the first.
      journal: where results go, one batch after the other.
      total: number of rows, for the time left.

    Returns:
      What this pass cost.
    """
    done = journal.rows
    if done:
        print(f"{done} of {total} rows are there already", file=sys.stderr)
    results = cascade.run(itertools.islice(rows, done, None), start=done)
    progress, shown = ProgressWriter(total, done), time.monotonic()
    waiting: list[dict[str, Any]] = []
    try:
        for result in results:
            waiting.append(record(result))
            if len(waiting) == cascade.batch_size:
                journal.append(waiting)
                waiting = []
                if time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    _show(progress, journal.rows, results.statistics())
    finally:
        journal.append(waiting)
        progress.close()
    return results.statistics()


def _watched(cascade: Cascade, rows: Sequence[Row], total: int) -> list[Routed]:
    """All results, with progress."""
    results, found = cascade.run(rows), []
    progress, shown = ProgressWriter(total), time.monotonic()
    for result in results:
        found.append(result)
        if time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            _show(progress, len(found), results.statistics())
    progress.close()
    return found


def _show(progress: ProgressWriter, rows: int, statistics: Statistics) -> None:
    progress.write(rows, {"to Super": statistics.share_super, "failed": statistics.failed})


def record(result: Routed) -> dict[str, Any]:
    """A result as a line of the output."""
    score = None if result.score is None or math.isnan(result.score) else result.score
    line = {"index": result.index, "output": result.output, "model": result.model, "score": score}
    line["cost"] = result.cost
    if result.error is not None:
        line |= {"error": result.error, "fallback": result.fallback}
    return line

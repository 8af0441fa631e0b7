"""`elastic-lm route`: fits a rule on labelled rows, and answers files of rows by one."""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any

from elastic_lm.cascade.answerer import Record, previewing
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.guarantee import CascadeRisk
from elastic_lm.cascade.results import CascadeResult, CascadeStatistics
from elastic_lm.cascade.rule import CascadeRule, fit_rule
from elastic_lm.cascade.scores import Scoring
from elastic_lm.cascade.sweep import ALWAYS_SUPER, Measured
from elastic_lm.cli.cascade.checks import check_goals, check_pair
from elastic_lm.cli.cascade.identity import (
    answers_path,
    fingerprints,
    fit_identity,
    run_identity,
    swift_name,
    warn_other_models,
)
from elastic_lm.cli.cascade.lines import answers_line, answers_of, check_costs, measured_of, record
from elastic_lm.cli.cascade.models import make_pair
from elastic_lm.cli.cascade.quality import class_names, right_answers, written_names
from elastic_lm.config.checks import require
from elastic_lm.files.atomic import prepare_output
from elastic_lm.files.journal import Journal, count_rows, read_rows
from elastic_lm.report.writers import ProgressWriter

PROGRESS_SECONDS = 5.0  # between lines of progress
Line = Callable[[CascadeResult], dict[str, Any]]


def run(args: argparse.Namespace) -> None:
    """Runs `elastic-lm route fit` or `elastic-lm route run`."""
    {"fit": fit_command, "run": run_command}[args.action](args)


def fit_command(args: argparse.Namespace) -> None:
    """Both models answer labelled rows; a threshold is chosen, printed and written."""
    check_goals(args)
    risk = None if args.risk is None else CascadeRisk(args.risk, args.epsilon or 0.05)
    scoring = Scoring(1.0 if args.temperature is None else args.temperature, args.centre or "none")
    for path in (args.out, args.plot):
        prepare_output(path)
    _check_models(args)
    rows = list(read_rows(args.data))
    require(bool(rows), "--data", args.data, "holds no row")
    found = fingerprints(args)
    settings = fit_identity(args, found, scoring)
    kept = answers_path(args.out, settings)
    with closing(Journal(kept, settings)) as journal:
        measured = measure(args, rows, scoring, journal)
    score = args.score or "energy"
    goals = {name: getattr(args, name) for name in ("target_accuracy", "target_cost", "super_accuracy")}
    how = {"score": score, "scoring": scoring, "seed": args.seed, "unit": args.cost, "data": args.data}
    models = {"swift": swift_name(args), "super": args.super_}
    try:
        rule = fit_rule(measured, **goals, risk=risk, **how, models=models, fingerprints=found)
    except ValueError as error:
        raise ValueError(f"{error}; the answers are kept in {kept}: another goal asks no model") from error
    rule.save(args.out)
    print(table(rule))
    if args.plot:
        from elastic_lm.cascade.plot import plot_cascade

        plot_cascade(rule.curve, rule.measured, args.plot, unit=args.cost)
    print(f"written to {args.out}; {kept} keeps the answers for other goals", file=sys.stderr)


def measure(args: argparse.Namespace, rows: Sequence[Record], scoring: Scoring, journal: Journal) -> Measured:
    """What both models give for labelled rows.

    Args:
      args: flags of `routing.flags`.
      rows: with labels.
      scoring: of the Swift's energy.
      journal: where the answers are, and where those that are missing go.

    Raises:
      ValueError: flags, models and rows do not fit together, or every row failed.
    """
    score = args.score or "energy"
    free = argparse.Namespace(**{**vars(args), "super_cost": 0.0})  # answers are kept without a price
    swift, super_ = make_pair(free, rows[0], scoring, score)
    check_pair(args, rows[0], swift, super_, score)
    fields = {"data": args.data, "label_field": args.label_field, "choices_field": args.choices_field}
    names = class_names(swift, super_)
    right = right_answers(rows, names, **fields, tolerance=args.tolerance)
    rule = CascadeRule(ALWAYS_SUPER, score, scoring.temperature, scoring.centre, args.seed)  # both answer
    cascade = Cascade(swift, super_, rule, batch_size=args.batch_size, preview=False)

    def line(result: CascadeResult) -> dict[str, Any]:
        if result.index == 0 and result.error is None:
            check_costs([result.answer], args)
        return answers_line(result)

    if args.retry_failed:
        retry(cascade, rows, journal, line)
    route(cascade, rows, journal, len(rows), line)
    answered = [answers_of(one) for one in journal.lines()]
    previewed = previewing(swift, score) is not None
    return measured_of(answered, rows, right, names, args, score, previewed)


def run_command(args: argparse.Namespace) -> None:
    """Answers a file of rows, or goes on with it."""
    rule = _rule(args)
    _check_models(args)
    first = next(read_rows(args.data), None)
    require(first is not None, "--data", args.data, "holds no row")
    assert first is not None
    found = fingerprints(args)
    warn_other_models(rule, args, found)
    with closing(Journal(args.out, run_identity(args, found, rule))) as journal:
        pair = make_pair(args, first, rule.scoring, rule.score)
        check_pair(args, first, *pair, rule.score)
        cascade = Cascade(*pair, rule, batch_size=args.batch_size)
        line = functools.partial(record, names=written_names(*pair))
        if args.retry_failed:
            retry(cascade, read_rows(args.data), journal, line)
        statistics = route(cascade, read_rows(args.data), journal, count_rows(args.data), line)
    print(statistics.text())
    print(f"written to {args.out}", file=sys.stderr)


def _check_models(args: argparse.Namespace) -> None:
    """Checks that a Swift is named, which everything else refers to."""
    if not args.swift and args.swift_exit is None:
        raise ValueError("--swift: name the small model, or --swift-exit of the Super")


def _rule(args: argparse.Namespace) -> CascadeRule:
    """The rule of --rule, or of --threshold."""
    given = [name for name in ("score", "temperature", "centre") if getattr(args, name) is not None]
    if (args.rule is None) == (args.threshold is None):
        raise ValueError(f"--rule {args.rule}, --threshold {args.threshold}: give one of them")
    if args.rule is None:
        own = {name: getattr(args, name) for name in given}
        return CascadeRule(args.threshold, **{"score": "energy", **own}, seed=args.seed)
    if given:
        raise ValueError(f"--{given[0]} {getattr(args, given[0])}: is settled by --rule; leave it out")
    return CascadeRule.load(args.rule)


def table(rule: CascadeRule) -> str:
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


def route(
    cascade: Cascade, rows: Iterable[Record], journal: Journal, total: int, line: Line | None = None
) -> CascadeStatistics:
    """Answers the rows that a journal does not hold yet.

    Args:
      cascade: who answers.
      rows: all rows, from the first.
      journal: where results go, one batch after the other.
      total: number of rows, for the time left.
      line: what is written of a result; None = `record`.

    Returns:
      What this pass cost.
    """
    line, done = line or record, journal.rows
    if done:
        print(f"{done} of {total} rows are there already", file=sys.stderr)
    results = cascade.run(itertools.islice(rows, done, None), start=done)
    progress, shown = ProgressWriter(total, done), time.monotonic()
    waiting: list[dict[str, Any]] = []
    try:
        for result in results:
            waiting.append(line(result))
            if len(waiting) == cascade.batch_size:
                batch, waiting = waiting, []  # what is interrupted while it is written is not written again
                journal.append(batch)
                if time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    _show(progress, journal.rows, results.statistics())
    finally:
        journal.append(waiting)
        progress.close()
    return results.statistics()


def retry(cascade: Cascade, rows: Iterable[Record], journal: Journal, line: Line = record) -> None:
    """Answers the rows again whose lines have an error, and puts the new lines in place of the old ones.

    Args:
      cascade: who answers.
      rows: all rows, from the first.
      journal: with lines of them.
      line: what is written of a result.
    """
    failed = [one["index"] for one in journal.lines() if "error" in one]
    if not failed:
        return
    wanted, again = set(failed), {}
    given = ((i, row) for i, row in enumerate(rows) if i in wanted)
    apart = cascade.rule.score == "random"  # which depends on a row's number
    groups: Iterable[list[tuple[int, Record]]] = ([pair] for pair in given) if apart else [list(given)]
    try:
        for group in groups:
            results = cascade.run((row for _, row in group), start=group[0][0])
            for (index, _), result in zip(group, results, strict=True):
                again[index] = line(dataclasses.replace(result, index=index))
    finally:
        journal.replace(again)
        left = len(failed) - sum("error" not in one for one in again.values())
        print(f"{len(failed)} rows had failed, {left} of them are without an answer still", file=sys.stderr)


def _show(progress: ProgressWriter, rows: int, statistics: CascadeStatistics) -> None:
    progress.write(rows, {"to Super": statistics.share_super, "failed": statistics.failed})

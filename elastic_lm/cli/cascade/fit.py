"""`elastic-lm cascade fit`: both models answer labelled records, and a threshold is chosen."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, get_args

from elastic_lm.cli.cascade.options import PairOptions, add_pair_flags, flag_name, is_url
from elastic_lm.cli.parser import local_place, require_share, share
from elastic_lm.config.cascade import CostUnit
from elastic_lm.config.checks import NOT_NEGATIVE, require, require_choice
from elastic_lm.config.guarantee import DEFAULT_EPSILON

if TYPE_CHECKING:
    from elastic_lm.cascade.answerer import Record
    from elastic_lm.cascade.rule import CascadeRule
    from elastic_lm.cascade.scores import Scoring
    from elastic_lm.cascade.sweep import Measurements
    from elastic_lm.files.journal import Journal

HELP = """\
Fits a threshold on labelled records.

elastic-lm cascade fit --swift small --super large --data val.jsonl --super-accuracy --out rule.json
elastic-lm cascade fit --swift small --super large --data val.jsonl --target-accuracy 0.93 --plot curve.png
elastic-lm cascade fit --swift-exit 6 --super runs/exits/model --data val.jsonl --risk 0.01 --epsilon 0.05

Both models answer every record, whose labels say who is right; the threshold is one run-time number. Goals:
the least cost that reaches an accuracy, or the Super's own; the most accurate within a mean cost; or, with
--risk, the least cost of which it is guaranteed that at most so much accuracy is lost against the Super.
The answers are kept beside the rule, in a file rule.answers-*.jsonl per pair, data and flags: another goal
asks no model, and a fit that was stopped goes on where it was.
"""

GOALS = ("target_accuracy", "target_cost", "super_accuracy")
CURVE_LINES = 10  # about as many points of the curve are printed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    """What a threshold is chosen for; exactly one goal is set."""

    target_accuracy: float | None = None  # the cheapest that reaches it
    target_cost: float | None = None  # the most accurate within it, per record
    super_accuracy: bool = False  # the cheapest with the Super's accuracy
    risk: float | None = None  # the cheapest that is guaranteed to lose no more accuracy
    epsilon: float | None = None  # with risk; None = DEFAULT_EPSILON
    label_field: str = "label"  # key of the right answer, or of a list of them
    tolerance: float | None = None  # regression: answers this close to the label are right
    cost: CostUnit = get_args(CostUnit)[0]  # what is saved
    out: str = "rule.json"  # file of the rule
    plot: str | None = None  # PNG of accuracy over cost

    def __post_init__(self) -> None:
        super().__post_init__()
        goals = self.given(("target_accuracy", "target_cost", "risk"))
        goals |= {"super_accuracy": True} if self.super_accuracy else {}
        require(len(goals) == 1, "goals", goals, f"set exactly one of {', '.join((*GOALS, 'risk'))}")
        for field in ("target_accuracy", "risk", "epsilon"):
            require_share(flag_name(field), getattr(self, field))
        if self.epsilon is not None and self.risk is None:
            raise ValueError(f"--epsilon {self.epsilon}: is part of a guarantee; give --risk too")
        for field in ("target_cost", "tolerance"):
            value = getattr(self, field)
            require(value is None or NOT_NEGATIVE[0](value), flag_name(field), value, NOT_NEGATIVE[1])
        require_choice("--cost", self.cost, get_args(CostUnit))
        if self.style == "openai" and is_url(self.super_) and self.cost == "flops" and not self.super_cost:
            raise ValueError(self.cost_is_missing())

    def cost_is_missing(self) -> str:
        """What to do about a Super whose costs nobody knows."""
        value = f"--super-cost {self.super_cost:g}"
        return f"{value}: the service does not say what a record costs; give it, or --cost seconds"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add_pair_flags(parser)
    goals = parser.add_mutually_exclusive_group(required=True)
    goals.add_argument("--target-accuracy", type=share, metavar="A", help="cheapest that reaches it")
    goals.add_argument("--target-cost", type=float, metavar="C", help="most accurate within it, per record")
    goals.add_argument("--super-accuracy", action="store_true", help="cheapest with the Super's accuracy")
    goals.add_argument("--risk", type=share, metavar="LOSS", help="cheapest guaranteed to lose no more")
    add = parser.add_argument
    epsilon = f"with --risk: probability of failure (default: {DEFAULT_EPSILON})"
    add("--epsilon", type=share, metavar="P", help=epsilon)
    label = f"the right answer, or a list (default: {Options.label_field})"
    add("--label-field", metavar="NAME", help=label)
    add("--tolerance", type=float, metavar="D", help="regression: answers this close to the label are right")
    cost = f"what is saved (default: {Options.cost})"
    add("--cost", choices=get_args(CostUnit), help=cost)
    add("--out", metavar="FILE", type=local_place, help=f"default: {Options.out}")
    add("--plot", metavar="FILE", help="accuracy over cost, as a PNG")


def run(options: Options) -> None:
    """Both models answer the records; a threshold is chosen, printed and written."""
    from elastic_lm.cascade.guarantee import CascadeRisk
    from elastic_lm.cascade.rule import fit_rule
    from elastic_lm.cascade.scores import Scoring
    from elastic_lm.cli.cascade.checks import check_record
    from elastic_lm.cli.cascade.identity import answers_path, fingerprints, fit_identity
    from elastic_lm.files.atomic import prepare_output
    from elastic_lm.files.journal import Journal, read_records

    risk = None
    if options.risk is not None:
        risk = CascadeRisk(options.risk, **options.given(("epsilon",)))
    scoring = Scoring(**options.given(("temperature", "centre")))
    for path in (options.out, options.plot):
        prepare_output(path)
    records = list(read_records(options.data))
    require(bool(records), "--data", options.data, "holds no record")
    check_record(options, records[0])

    found = fingerprints(options)
    settings = fit_identity(options, found, scoring)
    kept = answers_path(options.out, settings)
    contents: dict[str, dict[str, str]] = {}
    with closing(Journal(kept, settings)) as journal:
        measured = measure(options, records, scoring, journal, contents)

    try:
        rule = fit_rule(
            measured,
            **{name: getattr(options, name) for name in GOALS},
            risk=risk,
            score=options.scored_by,
            scoring=scoring,
            seed=options.seed,
            unit=options.cost,
            data=options.data,
            models={"swift": options.swift_name, "super": options.super_name},
            fingerprints=found,
            contents=contents,
        )
    except ValueError as error:
        raise ValueError(f"{error}; the answers are kept in {kept}: another goal asks no model") from error

    rule.save(options.out)
    print(table(rule))
    if options.plot:
        from elastic_lm.cascade.plot import plot_cascade

        plot_cascade(rule.curve, rule.measured, options.plot, unit=options.cost)
    print(f"written to {options.out}; {kept} keeps the answers for other goals", file=sys.stderr)


def measure(
    options: Options,
    records: "Sequence[Record]",
    scoring: "Scoring",
    journal: "Journal",
    contents: dict[str, dict[str, str]],
) -> "Measurements":
    """What both models give for labelled records.

    Args:
      options: of the command.
      records: with labels.
      scoring: of the Swift's energy.
      journal: where the answers are, and where those that are missing go.
      contents: gets the fingerprints of both models, see `make_pair`.

    Raises:
      ValueError: flags, models and records do not fit together, or every record failed.
    """
    from elastic_lm.cascade.answerer import can_preview
    from elastic_lm.cascade.cascade import Cascade
    from elastic_lm.cascade.results import CascadeResult
    from elastic_lm.cascade.rule import CascadeRule
    from elastic_lm.cascade.sweep import ALWAYS_SUPER
    from elastic_lm.cli.cascade.answering import answer_failed, answer_missing
    from elastic_lm.cli.cascade.checks import check_pair
    from elastic_lm.cli.cascade.lines import answers_line, answers_of, check_costs, measured_of
    from elastic_lm.cli.cascade.models import make_pair
    from elastic_lm.cli.cascade.quality import class_names, right_answers

    # The answers are kept without --super-cost, so that another price needs no new answers.
    score = options.scored_by
    swift, super_ = make_pair(options, records[0], scoring, score, super_cost=0.0, contents=contents)
    check_pair(options, records[0], swift, super_, score)
    names = class_names(swift, super_)
    right = right_answers(
        records,
        names,
        data=options.data,
        label_field=options.label_field,
        choices_field=options.choices_field,
        tolerance=options.tolerance,
    )

    # The threshold that sends every record to the Super makes both models answer it.
    rule = CascadeRule(
        ALWAYS_SUPER, score, temperature=scoring.temperature, centre=scoring.centre, seed=options.seed
    )
    cascade = Cascade(swift, super_, rule, batch_size=options.batch_size, preview=False)

    def line(result: CascadeResult) -> dict[str, Any]:
        if result.index == 0 and result.error is None:
            check_costs([result.answer], options)
        return answers_line(result)

    if options.retry_failed:
        answer_failed(cascade, records, journal, line)
    answer_missing(cascade, records, journal, len(records), line)
    answered = [answers_of(one) for one in journal.lines()]
    previewed = can_preview(swift, score)
    return measured_of(answered, records, right, names, options, previewed=previewed)


def table(rule: "CascadeRule") -> str:
    """Some of a rule's curve, and what was chosen."""
    from elastic_lm.cascade.sweep import ALWAYS_SUPER

    assert rule.measured is not None
    unit, data = rule.provenance["cost"], rule.provenance["data"]
    lines = [f"{rule.score} threshold   to Super   accuracy   mean {unit} per record"]
    spread = rule.curve[:: max(1, len(rule.curve) // CURVE_LINES)]
    for point in sorted({*spread, rule.curve[-1], rule.measured}, key=lambda p: p.threshold):
        shown = f"{point.threshold:.6g}" if abs(point.threshold) < ALWAYS_SUPER else "all"
        mark = " *" if point == rule.measured else ""
        numbers = f"{point.share_super:>10.2%} {point.accuracy:>10.4f} {point.cost:>14.4g}"
        lines.append(f"{shown:>16} {numbers}{mark}")

    lines.append(f"{data['rows']} records: Swift alone {data['swift']:.4f}, Super alone {data['super']:.4f}")
    if rule.guarantee:
        start = "guaranteed: " if rule.guarantee.achieved else ""
        lines.append(start + rule.guarantee.statement)
    return "\n".join(lines)

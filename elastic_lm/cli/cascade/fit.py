"""`elastic-lm cascade fit`: all models answer labelled records, and thresholds are chosen."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, get_args

from elastic_lm.cli.cascade.options import PairOptions, add_pair_flags, flag_name, is_url
from elastic_lm.cli.parser import local_place, require_share, share
from elastic_lm.config.cascade import COMPLETIONS, CostUnit
from elastic_lm.config.checks import NOT_NEGATIVE, require, require_choice
from elastic_lm.config.guarantee import DEFAULT_EPSILON

if TYPE_CHECKING:
    from elastic_lm.cascade.answerer import Record
    from elastic_lm.cascade.joint_rule import JointRule
    from elastic_lm.cascade.rule import CascadeRule
    from elastic_lm.cascade.scores import Scoring
    from elastic_lm.cli.cascade.lines import Labelled
    from elastic_lm.files.journal import Journal
    from elastic_lm.report.slices import FailureSlices

HELP = """\
Fits a threshold on labelled records.

elastic-lm cascade fit --swift small --super large --data val.jsonl --super-accuracy --out rule.json
elastic-lm cascade fit --swift small --super large --data val.jsonl --target-accuracy 0.93 --plot curve.png
elastic-lm cascade fit --swift-exit 6 --super runs/exits/model --data val.jsonl --risk 0.01 --epsilon 0.05
elastic-lm cascade fit --swift dir@exit=6 --between dir --super http://host/v1/chat/completions --style chat \
  --data val.jsonl --agreement --risk 0.05 --cost seconds

All models answer every record, whose labels say who is right; a threshold is one run-time number, and those
of several models are chosen together. Goals: the least cost that reaches an accuracy, or the Super's own; the
most accurate within a mean cost; or, with --risk, the least cost of which it is guaranteed that at most so
much accuracy is lost against the Super.
The answers are kept beside the rule, in a file rule.answers-*.jsonl per models, data and flags: another goal
asks no model, and a fit that was stopped goes on where it was. What agrees least with the Super is told by
label, length and fields of the records.
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
    agreement: bool = False  # instead: what the Super answers is right, and records need no labels
    slice_by: tuple[str, ...] = ()  # fields whose values agreement is told by, beside label and length
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
        self._check_costs()
        labels = self.chosen("label_field")
        if self.agreement and labels is not None:
            raise ValueError(f"--label-field {labels}: is not read with --agreement; leave one of them out")

    def _check_costs(self) -> None:
        """Refuses services that nobody knows the costs of."""
        if self.style not in COMPLETIONS or self.cost != "flops":
            return
        for place in self.places[:-1]:
            if is_url(place.place):
                fix = "is a service that does not say what a record costs in FLOPs; add --cost seconds"
                raise ValueError(f"{place.flag} {place.name}: {fix}")
        if is_url(self.super_) and not self.super_cost:
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
    add("--agreement", action="store_true", help="instead of labels: what the large model answers is right")
    by = "a field whose values agreement is told by, beside label and length; may be given several times"
    add("--slice-by", metavar="FIELD", action="append", help=by)
    add("--tolerance", type=float, metavar="D", help="regression: answers this close to the label are right")
    cost = f"what is saved (default: {Options.cost})"
    add("--cost", choices=get_args(CostUnit), help=cost)
    add("--out", metavar="FILE", type=local_place, help=f"default: {Options.out}")
    add("--plot", metavar="FILE", help="accuracy over cost, as a PNG")


def run(options: Options) -> None:
    """All models answer the records; thresholds are chosen, printed and written."""
    from elastic_lm.cascade.scores import Scoring
    from elastic_lm.cli.cascade.checks import check_record
    from elastic_lm.cli.cascade.identity import answers_path, fingerprints, fit_identity
    from elastic_lm.files.atomic import prepare_output
    from elastic_lm.files.journal import Journal, read_records

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
        labelled = measure(options, records, scoring, journal, contents)

    try:
        rule = chosen(options, labelled, scoring, found, contents)
    except ValueError as error:
        raise ValueError(f"{error}; the answers are kept in {kept}: another goal asks no model") from error

    slices = slices_of(options, records, labelled, rule)
    rule = dataclasses.replace(rule, provenance={**rule.provenance, "slices": slices.to_json()})
    rule.save(options.out)
    print(table(rule))
    print(slices.text("agreement with the Super", "records"))
    print("the slices are of the records that the thresholds were chosen on")
    if options.plot:
        from elastic_lm.cascade.plot import plot_cascade

        plot_cascade(rule.curve, rule.measured, options.plot, unit=options.cost)
    print(f"written to {options.out}; {kept} keeps the answers for other goals", file=sys.stderr)


def chosen(
    options: Options,
    labelled: "Labelled",
    scoring: "Scoring",
    found: dict[str, str | None],
    contents: dict[str, dict[str, str]],
) -> "CascadeRule | JointRule":
    """The rule for the goal, of two models or of more.

    Args:
      options: of the command.
      labelled: what the models gave.
      scoring: of the energies of all but the last.
      found: fingerprints of their files.
      contents: fingerprints of what was loaded.

    Raises:
      ValueError: the goal is out of reach.
    """
    from elastic_lm.cascade.guarantee import CascadeRisk
    from elastic_lm.cascade.joint_rule import fit_joint
    from elastic_lm.cascade.rule import fit_rule

    goal = {name: getattr(options, name) for name in GOALS}
    if options.risk is not None:
        goal["risk"] = CascadeRisk(options.risk, **options.given(("epsilon",)))
    recorded: dict[str, Any] = {
        "seed": options.seed,
        "unit": options.cost,
        "data": options.data,
        "models": options.names,
        "fingerprints": found,
        "contents": contents,
    }
    scores = options.scored_by
    if len(scores) == 1:
        return fit_rule(labelled.pair, **goal, score=scores[0], scoring=scoring, **recorded)
    return fit_joint(labelled.measured, **goal, scores=scores, scorings=scoring, **recorded)


def measure(
    options: Options,
    records: "Sequence[Record]",
    scoring: "Scoring",
    journal: "Journal",
    contents: dict[str, dict[str, str]],
) -> "Labelled":
    """What all models give for labelled records.

    Args:
      options: of the command.
      records: with labels, unless the Super says what is right.
      scoring: of the energies of all models but the last.
      journal: where the answers are, and where those that are missing go.
      contents: gets the fingerprints of the models, see `make_members`.

    Raises:
      ValueError: flags, models and records do not fit together, or every record failed.
    """
    from elastic_lm.cascade.answerer import can_preview
    from elastic_lm.cascade.cascade import Cascade
    from elastic_lm.cascade.joint_rule import JointRule
    from elastic_lm.cascade.results import CascadeResult
    from elastic_lm.cascade.rule import Stage
    from elastic_lm.cascade.sweep import ALWAYS_SUPER
    from elastic_lm.cli.cascade.answering import answer_failed, answer_missing
    from elastic_lm.cli.cascade.checks import check_members
    from elastic_lm.cli.cascade.lines import answers_line, answers_of, check_costs, measured_of
    from elastic_lm.cli.cascade.models import make_members
    from elastic_lm.cli.cascade.quality import class_names, right_answers

    # The answers are kept without --super-cost, so that another price needs no new answers.
    scores = options.scored_by
    members = make_members(options, records[0], scoring, scores, super_cost=0.0, contents=contents)
    check_members(options, records[0], members, scores)
    names = class_names(*members)
    right = None
    if not options.agreement:
        right = right_answers(
            records,
            names,
            data=options.data,
            label_field=options.label_field,
            choices_field=options.choices_field,
            tolerance=options.tolerance,
        )

    # Thresholds that send every record to the Super make all models answer it.
    how = {"temperature": scoring.temperature, "centre": scoring.centre}
    rule = JointRule(tuple(Stage(ALWAYS_SUPER, score, **how) for score in scores), seed=options.seed)
    cascade = Cascade(
        members[0],
        members[-1],
        rule,
        between=members[1:-1],
        batch_size=options.batch_size,
        preview=False,
    )

    def line(result: CascadeResult) -> dict[str, Any]:
        if result.index == 0 and result.error is None:
            check_costs([result.answer], options)
        return answers_line(result)

    if options.retry_failed:
        answer_failed(cascade, records, journal, line)
    answer_missing(cascade, records, journal, len(records), line)
    answered = [answers_of(one) for one in journal.lines()]
    previewed = [can_preview(member, score) for member, score in zip(members, scores, strict=False)]
    return measured_of(answered, records, right, names, options, previewed=previewed)


def slices_of(
    options: Options, records: "Sequence[Record]", labelled: "Labelled", rule: "CascadeRule | JointRule"
) -> "FailureSlices":
    """How often the cascade answers as the Super, by what answered, label, length and fields of the records.

    Args:
      options: of the command.
      records: all of them.
      labelled: what the models gave for those that none failed on.
      rule: that was chosen.

    Returns:
      The average and the slices; a record that lacks a field is in the slice "none" of it.
    """
    import numpy as np

    from elastic_lm.report.slices import failure_slices, length_buckets

    own = [records[i] for i in labelled.index]
    by = labelled.measured.answered_by(tuple(stage.threshold for stage in rule.stages))
    names = list(options.names)
    keys: dict[str, Sequence[Any]] = {"answered by": [names[member] for member in by]}
    labels = () if options.agreement else (options.label_field,)
    fields = dict.fromkeys((*labels, *(f for f in ("file",) if f in own[0]), *options.slice_by))
    for field in fields:
        keys[field] = [_slice_name(record.get(field)) for record in own]
    texts = [record.get(options.text_field) for record in own]
    if all(isinstance(text, str) for text in texts):
        keys["words"] = length_buckets([len(str(text).split()) for text in texts])
    return failure_slices(labelled.same[by, np.arange(len(by))], keys)


def _slice_name(value: Any) -> str:
    """A value of a record as slices call it."""
    return "none" if value is None else str(value)


def table(rule: "CascadeRule | JointRule") -> str:
    """Some of a rule's curve, and what was chosen."""
    from elastic_lm.cascade.joint_rule import JointRule

    data = rule.provenance["data"]
    lines = _joint_lines(rule) if isinstance(rule, JointRule) else _lines(rule)
    alone = f"Swift alone {data['swift']:.4f}, Super alone {data['super']:.4f}"
    if isinstance(rule, JointRule):
        names = rule.provenance["models"]
        alone = ", ".join(f"{n} alone {a:.4f}" for n, a in zip(names, data["members"], strict=True))
    lines.append(f"{data['rows']} records: {alone}")
    if rule.guarantee:
        start = "guaranteed: " if rule.guarantee.achieved else ""
        lines.append(start + rule.guarantee.statement)
    return "\n".join(lines)


def _lines(rule: "CascadeRule") -> list[str]:
    """Lines of a table of thresholds."""
    from elastic_lm.cascade.sweep import ALWAYS_SUPER

    assert rule.measured is not None
    lines = [f"{rule.score} threshold   to Super   accuracy   mean {rule.provenance['cost']} per record"]
    spread = rule.curve[:: max(1, len(rule.curve) // CURVE_LINES)]
    for point in sorted({*spread, rule.curve[-1], rule.measured}, key=lambda p: p.threshold):
        shown = f"{point.threshold:.6g}" if abs(point.threshold) < ALWAYS_SUPER else "all"
        mark = " *" if point == rule.measured else ""
        numbers = f"{point.share_super:>10.2%} {point.accuracy:>10.4f} {point.cost:>14.4g}"
        lines.append(f"{shown:>16} {numbers}{mark}")
    return lines


def _joint_lines(rule: "JointRule") -> list[str]:
    """Lines of a table of the best thresholds for each cost, and whom they let answer."""
    assert rule.measured is not None
    names = list(rule.provenance["models"])
    scores = [f"{name} {stage.score}" for name, stage in zip(names, rule.stages, strict=False)]
    wide = [max(12, len(title)) for title in scores]
    title = " ".join(f"{title:>{w}}" for title, w in zip(scores, wide, strict=True))
    shares = " ".join(f"{name:>9}" for name in names)
    lines = [f"{title} {shares}   accuracy   mean {rule.provenance['cost']} per record"]
    spread = rule.curve[:: max(1, len(rule.curve) // CURVE_LINES)]
    for point in sorted({*spread, rule.curve[-1], rule.measured}, key=lambda p: (p.cost, p.accuracy)):
        own = " ".join(f"{_shown(t):>{w}}" for t, w in zip(point.thresholds, wide, strict=True))
        shares = " ".join(f"{share:>9.2%}" for share in point.shares)
        mark = " *" if point == rule.measured else ""
        lines.append(f"{own} {shares} {point.accuracy:>10.4f} {point.cost:>14.4g}{mark}")

    idle = [name for name, share in zip(names, rule.measured.shares, strict=True) if not share]
    if idle:
        lines.append(f"{', '.join(idle)} answered no record: the others may do as well without")
    return lines


def _shown(threshold: float) -> str:
    """A threshold, or how much it lets its member keep where it is no number."""
    from elastic_lm.cascade.sweep import ALWAYS_SUPER

    return f"{threshold:.6g}" if abs(threshold) < ALWAYS_SUPER else ("all" if threshold < 0 else "none")

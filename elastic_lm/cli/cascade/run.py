"""`elastic-lm cascade run`: answers a file of records by a rule, or goes on with it."""

import argparse
import dataclasses
import functools
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from elastic_lm.cli.belonging import add_force
from elastic_lm.cli.cascade.options import PairOptions, add_pair_flags
from elastic_lm.cli.parser import local_place
from elastic_lm.config.checks import require

if TYPE_CHECKING:
    from elastic_lm.cascade.joint_rule import JointRule
    from elastic_lm.cascade.rule import CascadeRule

HELP = """\
Answers records by a rule.

elastic-lm cascade run --swift small --super large --rule rule.json --data in.jsonl --out out.jsonl
elastic-lm cascade run --swift small --super http://host/answer --rule rule.json --data in.gz --out out.gz
elastic-lm cascade run --swift small --super large --threshold 1.31044 --data in.jsonl --out out.jsonl
elastic-lm cascade run --swift dir@exit=6 --between dir --super http://host/v1/chat/completions --style chat \
  --rule rule.json --data in.jsonl --out out.jsonl

Run it again after it was stopped: it goes on where it was. Each line of the output has the record's index,
output (the name of a class, where the models name them), model ("swift", "super", or "middle" for one between
them), score and cost (FLOPs); records that the Super fails on have an error, and the output of the largest
model before it as fallback, until --retry-failed.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    """Which rule decides, and where the answers go."""

    rule: str | None = None  # file from `cascade fit`
    threshold: float | tuple[float, ...] | None = None  # instead: the least score that each member keeps
    out: str  # JSON lines
    force: bool = False  # a rule of other models is taken without a word

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rule is None) == (self.threshold is None):
            raise ValueError(f"--rule {self.rule}, --threshold {self.threshold}: give one of them")
        if self.rule is not None:
            for name, value in self.given(("score", "temperature", "centre")).items():
                raise ValueError(f"--{name} {value}: is settled by --rule; leave it out")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add_pair_flags(parser)
    add = parser.add_argument
    add("--rule", metavar="FILE", help="from `cascade fit`")
    threshold = "instead: the least score that the Swift keeps, or that each member keeps, with commas"
    add("--threshold", type=thresholds, metavar="T", help=threshold)
    add("--out", required=True, metavar="FILE", type=local_place, help="JSON lines, or .gz of them")
    add_force(parser, "a rule")


def thresholds(text: str) -> float | tuple[float, ...]:
    """One threshold, or several with commas between them, as a flag's type."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, nor numbers with commas") from None
    return found[0] if len(found) == 1 else found


def run(options: Options) -> int:
    """Answers the records that the output does not hold yet.

    Returns:
      The exit status: 1 where every record of the output has failed.
    """
    from elastic_lm.cascade.cascade import Cascade
    from elastic_lm.cli.cascade.answering import answer_failed, answer_missing
    from elastic_lm.cli.cascade.checks import check_members, check_record
    from elastic_lm.cli.cascade.identity import check_models, fingerprints, run_identity
    from elastic_lm.cli.cascade.lines import result_line
    from elastic_lm.cli.cascade.models import make_members
    from elastic_lm.cli.cascade.quality import written_names
    from elastic_lm.files.journal import Journal, count_records, read_records

    rule = chosen_rule(options)
    first = next(read_records(options.data), None)
    require(first is not None, "--data", options.data, "holds no record")
    assert first is not None
    check_record(options, first)

    found = fingerprints(options)
    contents: dict[str, dict[str, str]] = {}
    with closing(Journal(options.out, run_identity(options, found, rule))) as journal:
        scores, scoring = [stage.score for stage in rule.stages], rule.stages[0].scoring
        members = make_members(
            options, first, scoring, scores, super_cost=options.super_cost, contents=contents
        )
        if not options.force:
            check_models(rule, options, found, contents)
        check_members(options, first, members, scores)
        how = {"between": members[1:-1], "batch_size": options.batch_size}
        cascade = Cascade(members[0], members[-1], rule, **how)
        line = functools.partial(result_line, names=written_names(*members))
        if options.retry_failed:
            answer_failed(cascade, read_records(options.data), journal, line)
        records, count = read_records(options.data), count_records(options.data)
        statistics = answer_missing(cascade, records, journal, count, line)
        nothing = statistics.failed == statistics.records and all("error" in one for one in journal.lines())

    print(statistics.text())
    print(f"written to {options.out}", file=sys.stderr)
    if nothing:
        print(f"every one of {count} records failed; their errors are in {options.out}", file=sys.stderr)
    return int(nothing)


def chosen_rule(options: Options) -> "CascadeRule | JointRule":
    """The rule of --rule, or one of --threshold.

    Raises:
      ValueError: it has another number of thresholds than there are members before the last.
    """
    from elastic_lm.cascade.joint_rule import JointRule, load_rule
    from elastic_lm.cascade.rule import CascadeRule, Stage

    before = len(options.places) - 1
    if options.rule is not None:
        rule = load_rule(options.rule)
        fix = f"is a rule of {len(rule.stages) + 1} models, and {before + 1} are named; fit one for them"
        require(len(rule.stages) == before, "--rule", options.rule, fix)
        return rule
    given = options.threshold
    assert given is not None
    each = given if isinstance(given, tuple) else (given,)
    fix = f"give one for each of the {before} models before the last, with commas"
    require(len(each) == before, "--threshold", ",".join(f"{t:g}" for t in each), fix)
    how = options.given(("temperature", "centre"))
    if before == 1:
        return CascadeRule(each[0], *options.scored_by, **how, seed=options.seed)
    stages = (Stage(t, score, **how) for t, score in zip(each, options.scored_by, strict=True))
    return JointRule(tuple(stages), seed=options.seed)

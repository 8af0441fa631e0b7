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
    from elastic_lm.cascade.rule import CascadeRule

HELP = """\
Answers records by a rule.

elastic-lm cascade run --swift small --super large --rule rule.json --data in.jsonl --out out.jsonl
elastic-lm cascade run --swift small --super http://host/answer --rule rule.json --data in.gz --out out.gz
elastic-lm cascade run --swift small --super large --threshold 1.31044 --data in.jsonl --out out.jsonl

Run it again after it was stopped: it goes on where it was. Each line of the output has the record's index,
output (the name of a class, where the models name them), model ("swift" or "super"), score and cost (FLOPs);
records that the Super fails on have an error, and the Swift's output as fallback, until --retry-failed.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    """Which rule decides, and where the answers go."""

    rule: str | None = None  # file from `cascade fit`
    threshold: float | None = None  # instead: the least score that the Swift keeps
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
    add("--threshold", type=float, metavar="T", help="instead: the least score that the Swift keeps")
    add("--out", required=True, metavar="FILE", type=local_place, help="JSON lines, or .gz of them")
    add_force(parser, "a rule")


def run(options: Options) -> int:
    """Answers the records that the output does not hold yet.

    Returns:
      The exit status: 1 where every record of the output has failed.
    """
    from elastic_lm.cascade.cascade import Cascade
    from elastic_lm.cli.cascade.answering import answer_failed, answer_missing
    from elastic_lm.cli.cascade.checks import check_pair, check_record
    from elastic_lm.cli.cascade.identity import check_models, fingerprints, run_identity
    from elastic_lm.cli.cascade.lines import result_line
    from elastic_lm.cli.cascade.models import make_pair
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
        pair = make_pair(
            options, first, rule.scoring, rule.score, super_cost=options.super_cost, contents=contents
        )
        if not options.force:
            check_models(rule, options, found, contents)
        check_pair(options, first, *pair, rule.score)
        cascade = Cascade(*pair, rule, batch_size=options.batch_size)
        line = functools.partial(result_line, names=written_names(*pair))
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


def chosen_rule(options: Options) -> "CascadeRule":
    """The rule of --rule, or one of --threshold."""
    from elastic_lm.cascade.rule import CascadeRule

    if options.rule is not None:
        return CascadeRule.load(options.rule)
    assert options.threshold is not None
    how = options.given(("temperature", "centre"))
    return CascadeRule(options.threshold, options.scored_by, **how, seed=options.seed)

"""`elastic-lm cascade`: fits a rule between models on labelled records, and answers records by it."""

from elastic_lm.cli.cascade import fit, run
from elastic_lm.cli.parser import Parser, add_command

HELP = """\
A small model answers records, and a large one those that the small one is not sure of.

elastic-lm cascade fit --swift small --super large --data val.jsonl --super-accuracy --out rule.json
elastic-lm cascade run --swift small --super large --rule rule.json --data in.jsonl --out out.jsonl

Classifiers, encoder-decoders and decoders (text, or multiple choice where records have choices), or services
behind HTTP; others may stand between the two (--between).
"""

ACTIONS = {"fit": fit, "run": run}


def add_flags(parser: Parser) -> None:
    """Adds `fit` and `run`, which are commands of their own."""
    choices = parser.add_subparsers(dest="action", required=True, metavar="fit|run", title="actions")
    for name, module in ACTIONS.items():
        add_command(choices, name, module)

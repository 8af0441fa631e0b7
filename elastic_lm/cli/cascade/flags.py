"""What can be typed after `elastic-lm route`."""

import argparse
from collections.abc import Callable

# Of flags that only some kinds of models read.
DEFAULTS = {
    "text_field": "text",
    "choices_field": "choices",
    "max_new_tokens": 32,
    "normalise": "tokens",
    "timeout": 30.0,
    "retries": 2,
    "style": "rows",
    "super_cost": 0.0,
}
FIT = """\
elastic-lm route fit --swift small --super large --data val.jsonl --super-accuracy --out rule.json
elastic-lm route fit --swift small --super large --data val.jsonl --target-accuracy 0.93 --plot curve.png
elastic-lm route fit --swift-exit 6 --super runs/exits/model --data val.jsonl --risk 0.01 --epsilon 0.05

Both models answer every row, whose labels say who is right; the threshold is one run-time number. Goals:
the least cost that reaches an accuracy, or the Super's own; the most accurate within a mean cost; or, with
--risk, the least cost of which it is guaranteed that at most so much accuracy is lost against the Super.
The answers are kept beside the rule, in a file rule.answers-*.jsonl per pair, data and flags: another goal
asks no model, and a fit that was stopped goes on where it was.
"""
RUN = """\
elastic-lm route run --swift small --super large --rule rule.json --data in.jsonl --out out.jsonl
elastic-lm route run --swift small --super http://host/answer --rule rule.json --data in.gz --out out.gz
elastic-lm route run --swift small --super large --threshold 1.31044 --data in.jsonl --out out.jsonl

Run it again after it was stopped: it goes on where it was. Each line of the output has the row's index,
output (the name of a class, where the models name them), model ("swift" or "super"), score and cost (FLOPs);
rows that the Super fails on have an error, and the Swift's output as fallback, until --retry-failed.
"""


def add_route(parser: argparse.ArgumentParser, share: Callable[[str], float]) -> None:
    """Adds `fit` and `run`.

    Args:
      parser: of `elastic-lm route`.
      share: type of flags that are shares.
    """
    actions = parser.add_subparsers(dest="action", required=True, metavar="fit|run", title="actions")
    fit = actions.add_parser("fit", help="fits a threshold on labelled rows", description=FIT)
    run = actions.add_parser("run", help="answers rows by a rule", description=RUN)
    for action in (fit, run):
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        _models(action)
        _rows(action)
        _energy(action)
        action.set_defaults(**DEFAULTS)
    _goals(fit, share)
    add = run.add_argument
    add("--rule", metavar="FILE", help="from `route fit`")
    add("--threshold", type=float, metavar="T", help="instead: the least score that the Swift keeps")
    add("--out", required=True, metavar="FILE", help="JSON lines, or .gz of them")


def _models(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--swift", metavar="DIR|URL", help="the small model: a folder, or a service that answers with scores")
    add("--swift-exit", type=int, metavar="L", help="instead: the exit after this layer of the Super")
    add("--super", dest="super_", required=True, metavar="DIR|URL", help="the large model")
    add("--max-new-tokens", type=int, metavar="N", help="of generated answers (default: 32)")
    add("--batch-size", type=int, default=16, metavar="N", help="rows per batch (default: 16)")
    add(
        "--normalise",
        choices=("tokens", "bytes", "none"),
        help="choices per",
    )
    add("--timeout", type=float, metavar="S", help="of a service, seconds (default: 30)")
    add("--retries", type=int, metavar="N", help="of a service, per row (default: 2)")
    add("--style", choices=("rows", "openai"), help="of a service: see decode.black_boxes")
    add("--service-model", metavar="NAME", help="openai: the model; ELASTIC_LM_API_KEY holds the key")
    add(
        "--super-cost",
        type=float,
        metavar="FLOPS",
        help="of a row, by a service",
    )


def _rows(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="JSON lines, or .gz of them")
    add("--text-field", metavar="NAME", help="the text, prompt or question (default: text)")
    add("--pair-field", metavar="NAME", help="encoders: the second text of a row")
    add("--choices-field", metavar="NAME", help="multiple choice, where rows have it")
    tokens = "encoders, encoder-decoders: tokens read of a row (default: the model's, 512)"
    add("--max-len", type=int, metavar="N", help=tokens)
    add("--template", metavar="TEXT", help='encoder-decoders: their source, "sst2 sentence: {text}"')
    only = "encoder-decoders: the only answers (default: any; with --score encoder_*, the head's classes)"
    add("--labels", metavar="A,B", help=only)
    add("--retry-failed", action="store_true", help="rows that failed before are answered again")


def _energy(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = (
        "energy (default), max_prob, entropy, margin; _min, prompt_: of sequences; random; encoder_: of the "
    )
    add("--score", help=names + "head on an encoder-decoder's encoder, before it decodes")
    add("--temperature", type=float, metavar="T", help="of the energy (default: 1)")
    add("--centre", choices=("none", "mean"), help="measure logits from their mean (default: none)")
    add("--seed", type=int, default=0, help="of random scores and of the halves of --risk (default: 0)")


def _goals(parser: argparse.ArgumentParser, share: Callable[[str], float]) -> None:
    goals = parser.add_mutually_exclusive_group(required=True)
    goals.add_argument("--target-accuracy", type=share, metavar="A", help="cheapest that reaches it")
    goals.add_argument("--target-cost", type=float, metavar="C", help="most accurate within it, per row")
    goals.add_argument("--super-accuracy", action="store_true", help="cheapest with the Super's accuracy")
    goals.add_argument("--risk", type=share, metavar="LOSS", help="cheapest guaranteed to lose no more")
    add = parser.add_argument
    add("--epsilon", type=share, metavar="P", help="with --risk: probability of failure (default: 0.05)")
    add("--label-field", default="label", metavar="NAME", help="the right answer, or a list (default: label)")
    add("--tolerance", type=float, metavar="D", help="regression: answers this close to the label are right")
    add("--cost", choices=("flops", "seconds"), default="flops", help="what is saved (default: flops)")
    add("--out", default="rule.json", metavar="FILE", help="default: %(default)s")
    add("--plot", metavar="FILE", help="accuracy over cost, as a PNG")

"""Whether what was typed after `elastic-lm route` fits the models and the rows, before these are answered."""

import argparse
import re
import string
from typing import Any

from elastic_lm.cascade.answerer import Answerer, Record
from elastic_lm.cascade.classifier import Classifier
from elastic_lm.cascade.endpoint import Endpoint
from elastic_lm.cascade.multiple_choice import MultipleChoice
from elastic_lm.cascade.text_answerer import TextAnswerer
from elastic_lm.cli.cascade.flags import DEFAULTS
from elastic_lm.cli.cascade.models import is_url
from elastic_lm.config.checks import NOT_NEGATIVE, require

ENCODER, WRITER, CHOOSER, GENERATOR = "encoders", "encoder-decoders", "decoders that choose", "decoders"
SERVICE, COMPLETION = "services", "services of --style openai"
READERS = {
    "pair_field": (ENCODER,),
    "max_len": (ENCODER, WRITER),
    "template": (WRITER,),
    "labels": (WRITER,),
    "normalise": (CHOOSER,),
    "max_new_tokens": (WRITER, GENERATOR, COMPLETION),
    "timeout": (SERVICE, COMPLETION),
    "retries": (SERVICE, COMPLETION),
    "style": (SERVICE, COMPLETION),
    "service_model": (COMPLETION,),
}


def check_goals(args: argparse.Namespace) -> None:
    """Checks what `route fit` reads after the models have answered.

    Raises:
      ValueError: a flag is out of range, or one is missing that says what a row costs.
    """
    if args.epsilon is not None and args.risk is None:
        raise ValueError(f"--epsilon {args.epsilon}: is part of a guarantee; give --risk too")
    for flag in ("target_cost", "super_cost", "tolerance"):
        value = getattr(args, flag)
        require(value is None or NOT_NEGATIVE[0](value), flag_name(flag), value, NOT_NEGATIVE[1])
    if args.style == "openai" and is_url(args.super_) and args.cost == "flops" and not args.super_cost:
        raise ValueError(cost_is_missing(args))


def cost_is_missing(args: argparse.Namespace) -> str:
    """What to do about a Super whose costs nobody knows."""
    fix = "the service does not say what a row costs; give it, or --cost seconds"
    return f"--super-cost {args.super_cost:g}: {fix}"


def check_pair(args: argparse.Namespace, row: Record, swift: Answerer, super_: Answerer, score: str) -> None:
    """Checks flags against the models that they named.

    Args:
      args: flags of `routing.flags`.
      row: the first of the data.
      swift: from `make_pair`.
      super_: likewise.
      score: that is read of the Swift.

    Raises:
      ValueError: a flag is read by none of them, a field is missing, or the Swift has no scores.
    """
    kinds = [_kind(args, model) for model in (swift, super_)]
    _check_readers(args, kinds)
    _check_fields(args, row, kinds)
    if isinstance(swift, Classifier) and not swift.classes and score != "random":
        given = f"--swift {args.swift}"
        if args.swift_exit is not None:
            given = f"--swift-exit {args.swift_exit} of {args.super_}"
        raise ValueError(
            f"{given}: is a regression, and has no {score} or other score that tells how sure it is; train "
            "it as a classifier, or ask a service that answers with scores"
        )


def _kind(args: argparse.Namespace, model: Answerer) -> str:
    if isinstance(model, Endpoint):
        return COMPLETION if args.style == "openai" else SERVICE
    kinds = {Classifier: ENCODER, TextAnswerer: WRITER, MultipleChoice: CHOOSER}
    return kinds.get(type(model), GENERATOR)


def _given(args: argparse.Namespace, flag: str) -> Any:
    """A flag's value where it is not the default; None elsewhere."""
    value = getattr(args, flag)
    return None if value == DEFAULTS.get(flag) else value


def _check_readers(args: argparse.Namespace, kinds: list[str]) -> None:
    found = " and ".join(dict.fromkeys(kinds))
    for flag, readers in READERS.items():
        fix = f"is read by {', '.join(readers)}, and these are {found}; leave it out"
        require(
            _given(args, flag) is None or bool({*readers} & {*kinds}),
            flag_name(flag),
            _given(args, flag),
            fix,
        )
    local = kinds[1] not in (SERVICE, COMPLETION)
    fix = "is of a service, and the Super's own costs are known; leave it out"
    require(not (local and args.super_cost), "--super-cost", args.super_cost, fix)
    for flag in ("temperature", "centre"):
        fix = "the Swift is a service, which answers with energies of its own; leave it out"
        value = getattr(args, flag)
        require(value is None or kinds[0] not in (SERVICE, COMPLETION), flag_name(flag), value, fix)


def _check_fields(args: argparse.Namespace, row: Record, kinds: list[str]) -> None:
    """Fields that the models read have to be in the first row."""
    reads_text = {ENCODER, CHOOSER, GENERATOR, COMPLETION} | (set() if args.template else {WRITER})
    fix = f"is no field of the first row of {args.data}, which has {', '.join(row)}"
    reads = bool(reads_text & {*kinds}) or _given(args, "text_field") is not None
    require(not reads or args.text_field in row, "--text-field", args.text_field, fix)
    require(not args.pair_field or args.pair_field in row, "--pair-field", args.pair_field, fix)
    choices = _given(args, "choices_field")
    require(choices is None or choices in row, "--choices-field", choices, fix)
    if args.template:
        for field in _fields(args.template):
            require(field in row, "--template", args.template, f"its {{{field}}} {fix}")
        _fill(args.template, row)
    labels = args.labels.split(",") if args.labels else []
    right = all(labels) and len({*labels}) == len(labels)
    require(right, "--labels", args.labels, "must be different texts with a comma between them")


def _fields(template: str) -> list[str]:
    """Names of the fields of a template."""
    try:
        parts = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"--template {template}: {error}") from error
    return [re.split(r"[.\[]", name)[0] for name in parts]


def _fill(template: str, row: Record) -> None:
    try:
        template.format_map(row)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        fix = "write fields as {name}"
        raise ValueError(f"--template {template}: cannot be filled from a row ({error}); {fix}") from error


def flag_name(flag: str) -> str:
    """As it is typed."""
    return "--" + flag.replace("_", "-")

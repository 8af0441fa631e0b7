"""Checks that the options of `elastic-lm cascade` fit the models and the records, before any is answered."""

import re
import string
from collections.abc import Sequence

from elastic_lm.cascade.answerer import Answerer, NamedAnswerer, Record
from elastic_lm.cascade.classifier import Classifier
from elastic_lm.cascade.endpoint import Endpoint
from elastic_lm.cascade.multiple_choice import MultipleChoice
from elastic_lm.cascade.text_answerer import TextAnswerer
from elastic_lm.cli.cascade.options import PairOptions, flag_name
from elastic_lm.config.cascade import COMPLETIONS
from elastic_lm.config.checks import require

# Kinds of models, as messages call them.
ENCODER, WRITER, CHOOSER, GENERATOR = "encoders", "encoder-decoders", "decoders that choose", "decoders"
SERVICE, COMPLETION = "services", "services of --style openai or chat"
NAMED = "answerers by name"

# Options that only some kinds of models read.
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
    "service_choices": (COMPLETION,),
    "top_logprobs": (COMPLETION,),
}


def check_record(options: PairOptions, record: Record) -> None:
    """Checks the fields that options name by themselves, before any model is loaded.

    A record without its choices is otherwise taken for a prompt, and other models answer those.

    Args:
      options: of the command.
      record: the first of the data.

    Raises:
      ValueError: a field is missing, or a template or the labels cannot be used.
    """
    fix = f"is no field of the first record of {options.data}, which has {', '.join(record)}"
    for field in ("text_field", "pair_field", "choices_field"):
        name = options.chosen(field)
        require(name is None or name in record, flag_name(field), name, fix)

    if options.template:
        for field in _fields(options.template):
            require(field in record, "--template", options.template, f"its {{{field}}} {fix}")
        _fill(options.template, record)
    labels = options.labels.split(",") if options.labels else []
    right = all(labels) and len({*labels}) == len(labels)
    require(right, "--labels", options.labels, "must be different texts with a comma between them")


def check_members(
    options: PairOptions, record: Record, members: Sequence[Answerer], scores: Sequence[str]
) -> None:
    """Checks options against the models that they named.

    Args:
      options: of the command.
      record: the first of the data.
      members: from `make_members`.
      scores: that are read of all but the last.

    Raises:
      ValueError: an option is read by no model, a field is missing, or a member has no scores.
    """
    kinds = [_kind(options, model) for model in members]
    named = {field for model in members for field in _reads(model)}
    _check_readers(options, kinds, named)
    _check_fields(options, record, kinds, named)
    for place, member, score in zip(options.places, members, scores, strict=False):
        if isinstance(member, Classifier) and not member.classes and score != "random":
            where = f"{place.flag} {place.place}"
            if place.kind:
                where = f"{place.flag} {place.value} of {place.place}"
            raise ValueError(
                f"{where}: is a regression, and has no {score} or other score that tells how sure it is; "
                "train it as a classifier, or ask a service that answers with scores"
            )


def _kind(options: PairOptions, model: Answerer) -> str:
    if isinstance(model, Endpoint):
        return COMPLETION if options.style in COMPLETIONS else SERVICE
    if isinstance(model, NamedAnswerer):
        return NAMED
    kinds = {Classifier: ENCODER, TextAnswerer: WRITER, MultipleChoice: CHOOSER}
    return kinds.get(type(model), GENERATOR)


def _reads(model: Answerer) -> tuple[str, ...]:
    """Options that an answerer by name reads."""
    return model.reads if isinstance(model, NamedAnswerer) else ()


def _check_readers(options: PairOptions, kinds: list[str], named: set[str]) -> None:
    found = " and ".join(dict.fromkeys(kinds))
    for field, readers in READERS.items():
        value = options.chosen(field)
        require(
            value is None or field in named or bool({*readers} & {*kinds}),
            flag_name(field),
            value,
            f"is read by {', '.join(readers)}, and these are {found}; leave it out",
        )

    *before, super_ = kinds
    require(
        super_ in (SERVICE, COMPLETION) or not options.super_cost,
        "--super-cost",
        options.super_cost,
        "is of a service, and the Super's own costs are known; leave it out",
    )
    own_energies = (SERVICE, COMPLETION, NAMED)
    for field in ("temperature", "centre"):
        value = getattr(options, field)
        require(
            value is None or any(kind not in own_energies for kind in before),
            flag_name(field),
            value,
            f"the Swift is one of the {before[0]}, which answer with energies of their own; leave it out",
        )


def _check_fields(options: PairOptions, record: Record, kinds: list[str], named: set[str]) -> None:
    """The text that the models read has to be in the first record, also where no option names its field."""
    reads_text = {ENCODER, CHOOSER, GENERATOR, COMPLETION} | (set() if options.template else {WRITER})
    if options.style == "chat" and "messages" in record:
        reads_text -= {COMPLETION}
    reads = bool(reads_text & {*kinds}) or "text_field" in named
    fix = f"is no field of the first record of {options.data}, which has {', '.join(record)}"
    require(not reads or options.text_field in record, "--text-field", options.text_field, fix)


def _fields(template: str) -> list[str]:
    """Names of the fields of a template."""
    try:
        parts = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"--template {template}: {error}") from error
    return [re.split(r"[.\[]", name)[0] for name in parts]


def _fill(template: str, record: Record) -> None:
    try:
        template.format_map(record)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        fix = "write fields as {name}"
        raise ValueError(f"--template {template}: cannot be filled from a record ({error}); {fix}") from error

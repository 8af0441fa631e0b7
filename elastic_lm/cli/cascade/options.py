"""What `elastic-lm cascade fit` and `run` are both told: the models, the records, and the models' scores."""

import argparse
import dataclasses
import re
from typing import Any, get_args

from elastic_lm.cli.parser import CommandOptions, require_seed
from elastic_lm.config.cascade import (
    ANSWER_TOKENS,
    BATCH_SIZE,
    COMPLETIONS,
    DEFAULT_SCORE,
    FITTED_SCORE,
    KINDS,
    RETRIES,
    SCORES,
    SOURCE_TOKENS,
    TEMPERATURE,
    TIMEOUT,
    TOP_LOGPROBS,
    AskedChoices,
    Centre,
    Normalise,
    Style,
    member_names,
    without_secrets,
)
from elastic_lm.config.checks import require, require_at_least_1, require_choice, require_not_negative

KEY = "ELASTIC_LM_API_KEY"  # environment variable with the key of a service
PART = re.compile(r"(?P<folder>.+)@(?P<kind>exit|subnet)=(?P<value>.+)")
PLACE = "DIR|URL|NAME:FILE"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model is, and which part of it is meant."""

    flag: str  # that names it
    place: str  # a folder, an address, or NAME:FILE
    kind: str = ""  # "exit" or "subnet"; "" = the whole model
    value: str = ""  # the layer of the exit, or what `--subnet` takes

    @classmethod
    def of(cls, flag: str, text: str) -> "Place":
        """The place that DIR, DIR@exit=6 or DIR@subnet=mlp=50% names."""
        found = None if is_url(text) else PART.fullmatch(text)
        return cls(flag, found["folder"], found["kind"], found["value"]) if found else cls(flag, text)

    @property
    def name(self) -> str:
        """What the model is called in files and messages."""
        return without_secrets(self.place) + (f" {self.kind} {self.value}" if self.kind else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions(CommandOptions):
    """Two models, or more, and the records that they answer."""

    swift: str | None = None  # the small model: a folder, an address, or NAME:FILE
    swift_exit: int | None = None  # instead: the exit after this layer of the Super
    between: tuple[str, ...] = ()  # models between the two, from the smallest to the largest
    super_: str  # the large model: a folder, an address, or NAME:FILE
    max_new_tokens: int = ANSWER_TOKENS  # of generated answers
    batch_size: int = BATCH_SIZE  # records per batch
    normalise: Normalise = get_args(Normalise)[0]
    timeout: float = TIMEOUT  # of a service, seconds
    retries: int = RETRIES  # of a service, per record
    style: Style = get_args(Style)[0]  # of a service
    service_model: str | None = None  # name of the model behind a service, or of each with commas
    service_choices: AskedChoices | None = None  # how a service is asked about choices; None = by its style
    top_logprobs: int | None = None  # of a service that scores; None = TOP_LOGPROBS
    super_cost: float = 0.0  # FLOPs of a record, by a service; 0 = it says so itself

    data: str  # JSON lines
    text_field: str = "text"  # key of the text, prompt or question
    pair_field: str | None = None  # encoders: key of the second text
    choices_field: str = "choices"  # multiple choice, where records have it
    max_len: int | None = None  # tokens read of a record; None = the model's
    template: str | None = None  # encoder-decoders: their source
    labels: str | None = None  # encoder-decoders: the only answers, with commas between them
    retry_failed: bool = False  # records that failed before are answered again

    score: str | None = None  # of all but the last, or of each with commas; None = the rule's, or `scored_by`
    temperature: float | None = None  # of the energy; None = the rule's, or Scoring.temperature
    centre: Centre | None = None  # None = the rule's, or Scoring.centre
    seed: int = 0  # of random scores, and of the halves of a guarantee

    def __post_init__(self) -> None:
        if self.swift_exit is None:
            if not self.swift:
                raise ValueError("--swift: name the small model, or --swift-exit of the Super")
        elif self.swift or is_url(self.super_):
            raise ValueError(f"--swift-exit {self.swift_exit}: is an exit of the Super; leave --swift out")
        require_at_least_1("--batch-size", self.batch_size)
        require_seed(self.seed)
        require_not_negative("--super-cost", self.super_cost)
        self._check_members()
        require_choice("--normalise", self.normalise, get_args(Normalise))
        require_choice("--style", self.style, get_args(Style))
        if self.centre is not None:
            require_choice("--centre", self.centre, get_args(Centre))

    def _check_members(self) -> None:
        """Refuses scores and names of services that do not fit the members."""
        before, services = self.places[:-1], [p for p in self.places if is_url(p.place)]
        for flag, given, members in (
            ("--score", self.score, before),
            ("--service-model", self.service_model, services),
        ):
            count = len(given.split(",")) if given else 1
            fix = f"give one for all, or one for each of {len(members)} with a comma between them"
            require(count in (1, len(members)), flag, given, fix)
        for place, score in zip(before, self.scored_by, strict=True):
            known = self.score is None or not _is_ours(place) or score in SCORES
            require(known, "--score", score, f"must be one of {', '.join(SCORES)}")
        top = self.top_logprobs
        require(top is None or top >= 1, "--top-logprobs", top, "must be at least 1")
        if self.service_choices is not None:
            require_choice("--service-choices", self.service_choices, get_args(AskedChoices))

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the models are, from the first to the last."""
        super_ = Place.of("--super", self.super_)
        exit_ = Place("--swift-exit", super_.place, "exit", str(self.swift_exit))
        between = (Place.of("--between", one) for one in self.between)
        return (Place.of("--swift", self.swift) if self.swift else exit_, *between, super_)

    @property
    def names(self) -> dict[str, str]:
        """What the members are called in files and messages, by "swift", "middle" and so on, and "super"."""
        places = self.places
        return dict(zip(member_names(len(places)), (place.name for place in places), strict=True))

    @property
    def scored_by(self) -> tuple[str, ...]:
        """Names of the scores that are read of every member but the last, where no rule names them.

        Of our models, and of services with log-probabilities, it is the largest probability, unless something
        is said of the energy.
        """
        before = self.places[:-1]
        if self.score:
            given = self.score.split(",")
            return tuple(given * len(before) if len(given) == 1 else given)
        about_energy = self.temperature is not None or self.centre is not None
        ours = (_is_ours(p) or (is_url(p.place) and self.style in COMPLETIONS) for p in before)
        return tuple(FITTED_SCORE if own and not about_energy else DEFAULT_SCORE for own in ours)

    def chosen(self, field: str) -> Any:
        """The value of a field, or None where it is the default, which every model can live with."""
        value, default = getattr(self, field), getattr(type(self), field, None)
        return None if value == default else value


def flag_name(field: str) -> str:
    """A field as it is typed."""
    return "--" + field.replace("_", "-")


def _is_ours(place: Place) -> bool:
    """Whether a model is one of ours; others may give scores of their own."""
    return not (is_url(place.place) or answerer_name(place.place)[0])


def is_url(place: str) -> bool:
    """Whether a model is a service rather than a folder."""
    return place.startswith(("http://", "https://"))


def answerer_name(place: str) -> tuple[str, str]:
    """(NAME, PLACE) of "NAME:PLACE", where NAME is an answerer on the face `elastic_lm.cascade`.

    Args:
      place: of a model; NAME is "" for folders and addresses, which need none.
    """
    from elastic_lm import cascade  # a list of names, which imports none of them

    name, colon, rest = place.partition(":")
    return (name, rest) if colon and name in cascade.__all__ else ("", place)


def add_pair_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `PairOptions`."""
    _add_models(parser)
    _add_records(parser)
    _add_score(parser)


def _add_models(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, PairOptions
    small = "the small model: a folder, a service that answers with scores, or an answerer by its name, as "
    add(
        "--swift",
        metavar=PLACE,
        help=f"{small}Function:rules.py; DIR@exit=6 and DIR@subnet=mlp=50%% are parts",
    )
    add("--swift-exit", type=int, metavar="L", help="instead: the exit after this layer of the Super")
    between = "a model between the two, named as --swift is; may be given several times, the smallest first"
    add("--between", metavar=PLACE, action="append", help=between)
    add("--super", dest="super_", required=True, metavar=PLACE, help="the large model")
    longest = f"of generated answers (default: {default.max_new_tokens})"
    add("--max-new-tokens", type=int, metavar="N", help=longest)
    add("--batch-size", type=int, metavar="N", help=f"records per batch (default: {default.batch_size})")
    normalise = "multiple choice: what the log-likelihood of a choice is divided by "
    normalise += f"(default: {default.normalise})"
    add("--normalise", choices=get_args(Normalise), help=normalise)
    timeout = f"of a service, seconds (default: {default.timeout:g})"
    add("--timeout", type=float, metavar="S", help=timeout)
    add("--retries", type=int, metavar="N", help=f"of a service, per record (default: {default.retries})")
    style = "of a service: records as JSON, or text or chat completions of the OpenAI API "
    add("--style", choices=get_args(Style), help=f"{style}(default: {default.style})")
    model = f"openai, chat: the model, or that of each service with commas; {KEY} holds the key"
    add("--service-model", metavar="NAME", help=model)
    asked = (
        "openai, chat: choices are listed and a letter is asked for, the reply begins with one, or none are "
    )
    asked += "asked about (default for chat: letters)"
    add("--service-choices", choices=get_args(AskedChoices), help=asked)
    top = f"openai, chat: likeliest tokens that a service which scores is asked for (default: {TOP_LOGPROBS})"
    add("--top-logprobs", type=int, metavar="K", help=top)
    add("--super-cost", type=float, metavar="FLOPS", help="of a record, by a service that does not say it")


def _add_records(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, PairOptions
    add("--data", required=True, metavar="FILE", help="JSON lines, or .gz of them")
    text = f"the text, prompt or question (default: {default.text_field})"
    add("--text-field", metavar="NAME", help=text)
    add("--pair-field", metavar="NAME", help="encoders: the second text of a record")
    choices = f"multiple choice, where records have it (default: {default.choices_field})"
    add("--choices-field", metavar="NAME", help=choices)
    tokens = "encoders, encoder-decoders: tokens read of a record "
    tokens += f"(default: all that an encoder can read, {SOURCE_TOKENS} for encoder-decoders)"
    add("--max-len", type=int, metavar="N", help=tokens)
    add("--template", metavar="TEXT", help='encoder-decoders: their source, "sst2 sentence: {text}"')
    only = "encoder-decoders: the only answers (default: any; with --score encoder_*, the head's classes)"
    add("--labels", metavar="A,B", help=only)
    add("--retry-failed", action="store_true", help="records that failed before are answered again")


def _add_score(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    kinds = ", ".join(f"{kind} (default)" if kind == FITTED_SCORE else kind for kind in KINDS)
    names = f"{kinds}; _min, prompt_: of sequences; random; encoder_: of the head on an encoder-decoder's "
    several = "; of several members with commas"
    add("--score", help=f"{names}encoder, before it decodes{several}")
    add("--temperature", type=float, metavar="T", help=f"of the energy (default: {TEMPERATURE:g})")
    centre = f"measure logits from their mean (default: {get_args(Centre)[0]})"
    add("--centre", choices=get_args(Centre), help=centre)
    seed = f"of random scores and of the halves of --risk (default: {PairOptions.seed})"
    add("--seed", type=int, help=seed)

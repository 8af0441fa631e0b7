"""From what `elastic-lm cascade` is given, a folder, an address or a name, to a model of a cascade."""

import os
from typing import Any

from elastic_lm import cascade
from elastic_lm.cascade.answerer import Answerer, NamedAnswerer, Record
from elastic_lm.cascade.classifier import Classifier
from elastic_lm.cascade.endpoint import Endpoint
from elastic_lm.cascade.generator import Generator
from elastic_lm.cascade.multiple_choice import MultipleChoice
from elastic_lm.cascade.scores import Scoring
from elastic_lm.cascade.shared_model import shared_classifier, shared_generator, shared_multiple_choice
from elastic_lm.cascade.text_answerer import TextAnswerer
from elastic_lm.checkpoints.loading import load
from elastic_lm.cli.belonging import parts_of
from elastic_lm.cli.cascade.options import KEY, PairOptions, answerer_name, is_url
from elastic_lm.config.cascade import DEFAULT_SCORE, PLACES
from elastic_lm.config.checks import require
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.seq2seq import LONGEST, TextToText
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.encoder import Encoder
from elastic_lm.models.exits import without_exits
from elastic_lm.models.registry import kind_of


def make_pair(
    options: PairOptions,
    record: Record,
    scoring: Scoring,
    score: str = DEFAULT_SCORE,
    *,
    super_cost: float = 0.0,
    contents: dict[str, dict[str, str]] | None = None,
) -> tuple[Answerer, Answerer]:
    """The Swift and the Super that the options name.

    Args:
      options: of the command.
      record: one of the data; choices in it make a decoder choose.
      scoring: of the Swift's energy.
      score: that is read of the Swift.
      super_cost: FLOPs of a record, where the Super is a service that does not say them.
      contents: gets the fingerprints by part of "swift" and "super", as far as they are loaded here.

    Raises:
      ValueError: an option does not fit the models; names it.
    """
    contents = {} if contents is None else contents
    if not options.swift:
        contents["swift"] = contents["super"] = parts = {}
        return _shared_pair(options, record, scoring, parts)

    contents |= {"swift": {}, "super": {}}
    how: dict[str, Any] = {"cost": 0.0, "score": score, "parts": contents["swift"]}
    swift = make_answerer(options, options.swift, record, scoring, **how)
    how = {"cost": super_cost, "parts": contents["super"]}
    return swift, make_answerer(options, options.super_, record, Scoring(), **how)


def make_answerer(
    options: PairOptions,
    place: str,
    record: Record,
    scoring: Scoring,
    *,
    cost: float,
    score: str = "",
    parts: dict[str, str] | None = None,
) -> Answerer:
    """One model, of the kind that is named, or that its folder holds.

    Args:
      options: of the command.
      place: folder, address, or name and file.
      record: see `make_pair`.
      scoring: of its energy.
      cost: FLOPs of a record, where the model is a service.
      score: that is read of it; "" = none.
      parts: gets the fingerprints of its weights and tokenizer, where they are loaded here.
    """
    if is_url(place):
        return _service(options, place, cost)
    name, rest = answerer_name(place)
    if name:
        return _named(options, name, rest)
    model, params = load(place)
    tokenizer = Tokenizer.load(place)
    tokenizer.check_vocabulary(model.config.vocab_size)
    if parts is not None:
        parts |= parts_of(params, tokenizer)
    shared: dict[str, Any] = {"scoring": scoring, "batch_size": options.batch_size}

    if isinstance(model, Encoder):
        return Classifier(model, params, tokenizer, **_text_options(options), **shared)
    if not isinstance(model, Decoder):
        texts = TextToText(model, params, tokenizer, max_len=max(LONGEST, options.max_len or 0))
        return TextAnswerer(
            texts,
            options.max_new_tokens,
            template=options.template or f"{{{options.text_field}}}",
            labels=options.labels.split(",") if options.labels else None,
            encoder_head=score.startswith(PLACES[2]),
            **options.given(("max_len",)),
            **shared,
        )
    if options.choices_field in record:
        return MultipleChoice(model, params, tokenizer, **_choice_options(options), **shared)
    # At full depth no token waits for its deeper layers, so that a window of 1 is enough.
    config, params = without_exits(model.config, params)
    sampler = Sampler(Decoder(config), params, tokenizer, window=1)
    prompt = {"prompt_field": options.text_field, "scored": bool(score)}
    return Generator(sampler, options.max_new_tokens, **prompt, **shared)


def _named(options: PairOptions, name: str, place: str) -> NamedAnswerer:
    """An answerer by the name of its class."""
    found = getattr(cascade, name)
    fix = "is no answerer that a command can make; give it a classmethod from_place"
    require(hasattr(found, "from_place"), "model", f"{name}:{place}", fix)
    return found.from_place(place, **{field: getattr(options, field) for field in found.reads})


def _service(options: PairOptions, url: str, cost: float) -> Endpoint:
    """A service; a key for it comes from the environment, where other users of the machine see none."""
    body = {"max_tokens": options.max_new_tokens} if options.style == "openai" else {}
    body |= {"model": options.service_model} if options.service_model else {}
    key = os.environ.get(KEY, "").strip()  # files that keys are read from end in a newline
    return Endpoint(
        url,
        timeout=options.timeout,
        retries=options.retries,
        style=options.style,
        text_field=options.text_field,
        options=body,
        headers={"Authorization": f"Bearer {key}"} if key else None,
        cost=cost,
    )


def _shared_pair(
    options: PairOptions, record: Record, scoring: Scoring, parts: dict[str, str]
) -> tuple[Answerer, Answerer]:
    """The Super, and one of its exits as the Swift."""
    model, params = load(options.super_)
    tokenizer = Tokenizer.load(options.super_)
    tokenizer.check_vocabulary(model.config.vocab_size)
    parts |= parts_of(params, tokenizer)
    how: dict[str, Any] = {
        "exit": options.swift_exit,
        "scoring": scoring,
        "batch_size": options.batch_size,
    }

    if isinstance(model, Encoder):
        return shared_classifier(model, params, tokenizer, **_text_options(options), **how)
    if not isinstance(model, Decoder):
        raise ValueError(
            f"--swift-exit {options.swift_exit}: {options.super_} holds an {kind_of(model.config).name}, "
            "which has no exits; name a model of its own as --swift"
        )
    if options.choices_field in record:
        return shared_multiple_choice(model, params, tokenizer, **_choice_options(options), **how)
    how["prompt_field"] = options.text_field
    return shared_generator(model, params, tokenizer, options.max_new_tokens, **how)


def _text_options(options: PairOptions) -> dict[str, Any]:
    return {
        "text_field": options.text_field,
        "pair_field": options.pair_field,
        "max_len": options.max_len,
    }


def _choice_options(options: PairOptions) -> dict[str, Any]:
    return {
        "prompt_field": options.text_field,
        "choices_field": options.choices_field,
        "normalise": options.normalise,
    }

"""From what `elastic-lm route` is given, a folder or an address, to a model of a cascade."""

import argparse
import os
from typing import Any, cast

from elastic_lm.cascade.answerer import Answerer, Record
from elastic_lm.cascade.classifier import Classifier
from elastic_lm.cascade.endpoint import Endpoint
from elastic_lm.cascade.generator import Generator
from elastic_lm.cascade.multiple_choice import MultipleChoice
from elastic_lm.cascade.scores import PLACES, Scoring
from elastic_lm.cascade.shared_model import shared_classifier, shared_generator, shared_multiple_choice
from elastic_lm.cascade.text_answerer import TextAnswerer
from elastic_lm.checkpoints.loading import load
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.seq2seq import LONGEST, TextToText
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.encoder import Encoder
from elastic_lm.models.registry import kind_of

KEY = "ELASTIC_LM_API_KEY"  # environment variable


def is_url(place: str) -> bool:
    """Whether a model is a service rather than a folder."""
    return place.startswith(("http://", "https://"))


def make_pair(
    args: argparse.Namespace, row: Record, scoring: Scoring, score: str = "energy"
) -> tuple[Answerer, Answerer]:
    """The Swift and the Super that flags name.

    Args:
      args: flags of `routing.flags`.
      row: one of the data; choices in it make a decoder choose.
      scoring: of the Swift's energy.
      score: that is read of the Swift.

    Raises:
      ValueError: a flag does not fit the models; names it.
    """
    if args.swift_exit is not None:
        if args.swift or is_url(args.super_):
            raise ValueError(f"--swift-exit {args.swift_exit}: is an exit of the Super; leave --swift out")
        return _nested(args, row, scoring)
    if not args.swift:
        raise ValueError("--swift: name the small model, or --swift-exit of the Super")
    swift = make_answerer(args, args.swift, row, scoring, cost=0.0, score=score)
    return swift, make_answerer(args, args.super_, row, Scoring(), cost=args.super_cost)


def make_answerer(
    args: argparse.Namespace, place: str, row: Record, scoring: Scoring, *, cost: float, score: str = ""
) -> Answerer:
    """One model, of the kind that its folder holds.

    Args:
      args: flags of `routing.flags`.
      place: folder or address.
      row: see `make_pair`.
      scoring: of its energy.
      cost: FLOPs of a row, where the model is a service.
      score: that is read of it; "" = none.
    """
    if is_url(place):
        return _service(args, place, cost)
    model, params = load(place)
    tokenizer = Tokenizer.load(place)
    shared: dict[str, Any] = {"scoring": scoring, "batch_size": args.batch_size}
    if isinstance(model, Encoder):
        return Classifier(model, params, tokenizer, **_text_flags(args), **shared)
    if not isinstance(model, Decoder):
        template = args.template or f"{{{args.text_field}}}"
        labels = args.labels.split(",") if args.labels else None
        texts = TextToText(model, params, tokenizer, max_len=max(LONGEST, args.max_len or 0))
        shared |= {} if args.max_len is None else {"max_len": args.max_len}
        shared |= {"template": template, "labels": labels, "encoder_head": score.startswith(PLACES[2])}
        return TextAnswerer(texts, args.max_new_tokens, **shared)
    if args.choices_field in row:
        return MultipleChoice(model, params, tokenizer, **_choice_flags(args), **shared)
    shared |= {"prompt_field": args.text_field, "scored": bool(score)}
    return Generator(Sampler(*_whole(model, params), tokenizer, window=1), args.max_new_tokens, **shared)


def _service(args: argparse.Namespace, url: str, cost: float) -> Endpoint:
    """A service; a key for it comes from the environment, where other users of the machine see none."""
    options = {"max_tokens": args.max_new_tokens} if args.style == "openai" else {}
    options |= {"model": args.service_model} if args.service_model else {}
    key = os.environ.get(KEY)
    return Endpoint(
        url,
        timeout=args.timeout,
        retries=args.retries,
        style=args.style,
        text_field=args.text_field,
        options=options,
        headers={"Authorization": f"Bearer {key}"} if key else None,
        cost=cost,
    )


def _nested(args: argparse.Namespace, row: Record, scoring: Scoring) -> tuple[Answerer, Answerer]:
    model, params = load(args.super_)
    tokenizer = Tokenizer.load(args.super_)
    how: dict[str, Any] = {"exit": args.swift_exit, "scoring": scoring, "batch_size": args.batch_size}
    if isinstance(model, Encoder):
        return shared_classifier(model, params, tokenizer, **_text_flags(args), **how)
    if not isinstance(model, Decoder):
        raise ValueError(
            f"--swift-exit {args.swift_exit}: {args.super_} holds an {kind_of(model.config).name}, which has "
            "no exits; name a model of its own as --swift"
        )
    if args.choices_field in row:
        return shared_multiple_choice(model, params, tokenizer, **_choice_flags(args), **how)
    how["prompt_field"] = args.text_field
    return shared_generator(model, params, tokenizer, args.max_new_tokens, **how)


def _text_flags(args: argparse.Namespace) -> dict[str, Any]:
    return {"text_field": args.text_field, "pair_field": args.pair_field, "max_len": args.max_len}


def _choice_flags(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "prompt_field": args.text_field,
        "choices_field": args.choices_field,
        "normalise": args.normalise,
    }


def _whole(model: Decoder, params: Params) -> tuple[Decoder, Params]:
    """A decoder without its exits, which full depth does not run."""
    exits = {e.name for e in model.config.exits}
    return Decoder(model.config.with_exits(())), cast(
        Params, {name: tree for name, tree in params.items() if name not in exits}
    )

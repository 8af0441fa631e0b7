"""From what `elastic-lm cascade` is given, folders, addresses and names, to the models of a cascade."""

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from elastic_lm import cascade
from elastic_lm.cascade.answerer import Answerer, NamedAnswerer, Record
from elastic_lm.cascade.classifier import Classifier
from elastic_lm.cascade.endpoint import Endpoint
from elastic_lm.cascade.generator import Generator
from elastic_lm.cascade.multiple_choice import MultipleChoice
from elastic_lm.cascade.scores import Scoring
from elastic_lm.cascade.shared_model import shared_members
from elastic_lm.cascade.text_answerer import TextAnswerer
from elastic_lm.checkpoints.loading import load
from elastic_lm.cli.belonging import parts_of
from elastic_lm.cli.cascade.options import KEY, PairOptions, Place, answerer_name, is_url
from elastic_lm.cli.width_flags import subnet_of
from elastic_lm.config.cascade import COMPLETIONS, PLACES, TOP_LOGPROBS
from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.seq2seq import LONGEST, TextToText
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.encoder import Encoder
from elastic_lm.models.exits import without_exits
from elastic_lm.models.registry import kind_of


def make_members(
    options: PairOptions,
    record: Record,
    scoring: Scoring,
    scores: Sequence[str],
    *,
    super_cost: float = 0.0,
    contents: dict[str, dict[str, str]] | None = None,
) -> tuple[Answerer, ...]:
    """The models that the options name, from the Swift to the Super.

    Parts of one folder are members of one model, which is loaded once.

    Args:
      options: of the command.
      record: one of the data; choices in it make a decoder choose.
      scoring: of the energies of all members but the last.
      scores: that are read of them.
      super_cost: FLOPs of a record, where the Super is a service that does not say them.
      contents: gets the fingerprints by part of every member, as far as they are loaded here.

    Raises:
      ValueError: an option does not fit the models; names it.
    """
    contents = {} if contents is None else contents
    places, last = options.places, len(options.places) - 1
    divided = {place.place for place in places if place.kind}
    members: dict[int, Answerer] = {}
    for number, (name, place) in enumerate(zip(options.names, places, strict=True)):
        if number in members:
            continue
        contents[name] = parts = {}
        if place.place in divided:
            own = [i for i, other in enumerate(places) if other.place == place.place]
            contents |= {list(options.names)[i]: parts for i in own}
            made = _parts_of_one(options, [places[i] for i in own], record, scoring, parts, own[-1] == last)
            members |= dict(zip(own, made, strict=True))
        else:
            how: dict[str, Any] = {"parts": parts, "cost": super_cost if number == last else 0.0}
            how |= {"scoring": Scoring()} if number == last else {"scoring": scoring, "score": scores[number]}
            members[number] = make_answerer(options, number, record, **how)
    return tuple(members[number] for number in range(last + 1))


def make_answerer(
    options: PairOptions,
    number: int,
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
      number: of the member, whose place is a folder, an address, or a name and a file.
      record: see `make_members`.
      scoring: of its energy.
      cost: FLOPs of a record, where the model is a service.
      score: that is read of it; "" = none.
      parts: gets the fingerprints of its weights and tokenizer, where they are loaded here.
    """
    place = options.places[number].place
    if is_url(place):
        return _service(options, number, cost, scored=bool(score))
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


def _service(options: PairOptions, number: int, cost: float, *, scored: bool) -> Endpoint:
    """A service; a key for it comes from the environment, where other users of the machine see none."""
    how: dict[str, Any] = {}
    services = [i for i, place in enumerate(options.places) if is_url(place.place)]
    if options.style in COMPLETIONS:
        choices = options.service_choices or ("letters" if options.style == "chat" else "ignored")
        read = scored or choices == "texts"
        top = options.top_logprobs or (TOP_LOGPROBS if read else 0)
        how |= {"choices": choices, "choices_field": options.choices_field, "top_logprobs": top}
        body: dict[str, Any] = {"max_tokens": options.max_new_tokens}
        if options.service_model:
            models = options.service_model.split(",")
            body["model"] = models[services.index(number) if len(models) > 1 else 0]
        how["options"] = body
    key = service_key(options, number)
    return Endpoint(
        options.places[number].place,
        timeout=options.timeout,
        retries=options.retries,
        style=options.style,
        text_field=options.text_field,
        headers={"Authorization": f"Bearer {key}"} if key else None,
        cost=cost,
        **how,
    )


def service_key(options: PairOptions, number: int) -> str:
    """The key of a service: the variable's, or one of several with commas; no key is sent to two hosts.

    Args:
      options: of the command.
      number: of the member.

    Raises:
      ValueError: there is one key for services of several hosts, or another number of keys than services.
    """
    services = [i for i, place in enumerate(options.places) if is_url(place.place)]
    keys = [key.strip() for key in os.environ.get(KEY, "").split(",")]  # a file's key ends in a newline
    hosts = {urlsplit(options.places[i].place).netloc.rpartition("@")[2] for i in services}
    if keys == [""]:
        return ""
    if len(keys) == 1:
        fix = f"is one key for {len(hosts)} hosts; give one for each of {len(services)} services, with commas"
        require(len(hosts) == 1, KEY, "...", fix)
        return keys[0]
    fix = f"are keys of {len(services)} services, in their order; an empty one sends none"
    require(len(keys) == len(services), f"{KEY}: count", len(keys), fix)
    return keys[services.index(number)]


def _parts_of_one(
    options: PairOptions,
    places: Sequence[Place],
    record: Record,
    scoring: Scoring,
    contents: dict[str, str],
    ends: bool,
) -> tuple[Answerer, ...]:
    """Members of one model: exits, sub-networks and the whole.

    Args:
      options: of the command.
      places: of the members, all in one folder.
      record: see `make_members`.
      scoring: of their energies.
      contents: gets the fingerprints of its weights and tokenizer.
      ends: whether the last of them is the last of the cascade, which needs no scores.
    """
    folder = places[0].place
    model, params = load(folder)
    tokenizer = Tokenizer.load(folder)
    tokenizer.check_vocabulary(model.config.vocab_size)
    contents |= parts_of(params, tokenizer)
    how: dict[str, Any] = {"scoring": scoring, "batch_size": options.batch_size}

    if not isinstance(model, Encoder | Decoder):
        raise ValueError(
            f"{places[0].flag} {places[0].value}: {folder} holds an {kind_of(model.config).name}, which has "
            "no exits; name a model of its own as --swift"
        )
    parts = [_part(place, model.config) for place in places]
    if isinstance(model, Encoder):
        how |= _text_options(options)
    elif options.choices_field in record:
        how |= _choice_options(options)
    else:
        how |= {"prompt_field": options.text_field, "max_new_tokens": options.max_new_tokens}
        how["scored_last"] = not ends
    return shared_members(model, params, tokenizer, parts, **how)


def _part(place: Place, config: ModelConfig | Any) -> int | Subnet | None:
    """The part of a model that a place names.

    Raises:
      ValueError: an exit is no whole number, or there is no such sub-network.
    """
    if place.kind == "exit":
        right = place.value.isdecimal() and int(place.value) > 0
        require(right, f"{place.flag}: exit", place.value, "must be the number of a layer, like 6")
        return int(place.value)
    if place.kind == "subnet":
        require(isinstance(config, ModelConfig), place.flag, place.name, "only decoders have sub-networks")
        return subnet_of(place.value.split()).of(config, place.place)
    return None


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

"""A Swift inside the Super: an exit, or a sub-network, of the same checkpoint.

An exit's hidden state is the state that the remaining layers need. Rows that go to the Super continue from
it, and the Super costs what is left to do:

    h = layers_1..l (x)        Swift = exit_l(h)        Super = head(layers_l+1..L (h))

A sub-network's states are its own, so that the Super begins again; its weights are slices of the Super's,
cut inside the programs. Between calls one model's weights lie in memory either way. A program that reads
known tokens, as for multiple choice and scores, holds one layer's slice beside them (`reading.read`). One
that generates holds the whole slice until its batch is done: to cut every layer in every step would make
half the width slower than all of it (measured on CPU: 11.4 ms per token, all 9.9 ms, half alone 4.8 ms).
"""

import dataclasses
from typing import Any

from elastic_lm.cascade.classifier import Classifier
from elastic_lm.cascade.generator import Generator
from elastic_lm.cascade.known_tokens import Part
from elastic_lm.cascade.multiple_choice import MultipleChoice
from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.results import TextTokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.encoder import Encoder, exit_name
from elastic_lm.models.task_heads import exit_encoder


def shared_multiple_choice(
    model: Decoder,
    params: Params,
    tokenizer: TextTokenizer,
    *,
    exit: int | None = None,
    subnet: Subnet | None = None,
    **how: Any,
) -> tuple[MultipleChoice, MultipleChoice]:
    """Swift and Super for multiple choice, of one model.

    Args:
      model: with the exit, where one answers first; static.
      params: its canonical parameters, which are not copied.
      tokenizer: of the model.
      exit: layer of the exit that is the Swift.
      subnet: the sub-network that is the Swift, instead.
      **how: other arguments of `MultipleChoice`, for both.

    Returns:
      (Swift, Super). The Super's answers to rows that the Swift has begun equal those from scratch, to float
      rounding.

    Raises:
      ValueError: not exactly one Swift is named, or it is none of the model's.
    """
    _one_of(exit, subnet)
    given = (model, params, tokenizer)
    _below(model.config, exit)
    return MultipleChoice(
        *given, exit=exit, subnet=subnet, keep_state=exit is not None, **how
    ), MultipleChoice(*given, **how)


def shared_generator(
    model: Decoder,
    params: Params,
    tokenizer: TextTokenizer,
    max_new_tokens: int = 64,
    *,
    exit: int | None = None,
    subnet: Subnet | None = None,
    window: int = 1,
    **how: Any,
) -> tuple[Generator, Generator]:
    """Swift and Super that generate, of one model.

    Args:
      model: with the exit, of kind `norm`, where one answers first; static.
      params: its canonical parameters, which are not copied.
      tokenizer: of the model.
      max_new_tokens: tokens of an answer at most.
      exit: layer of the exit that is the Swift. The Super goes on from its states of the prompt.
      subnet: the sub-network that is the Swift, instead.
      window: of the samplers; static.
      **how: other arguments of `Generator`, for both.

    Returns:
      (Swift, Super); the Super gives no scores.

    Raises:
      ValueError: not exactly one Swift is named, or it is none of the model's.
    """
    _one_of(exit, subnet)
    _below(model.config, exit)
    whole = model.config.with_exits(())
    own = {name: tree for name, tree in params.items() if name not in {e.name for e in model.config.exits}}
    super_ = Generator(
        Sampler(Decoder(whole), own, tokenizer, window=window), max_new_tokens, **{**how, "scored": False}
    )
    if exit is None:
        sampler = Sampler(Decoder(whole), own, tokenizer, window=window, subnet=subnet, slice_inside=True)
        return Generator(sampler, max_new_tokens, **how), super_
    sampler = Sampler(*exit_model(model.config, params, exit), tokenizer, window=window)
    reads = (Part(model.config, exit), params)
    return Generator(sampler, max_new_tokens, reads=reads, keep_state=True, **how), super_


def shared_classifier(
    model: Encoder, params: Params, tokenizer: Tokenizer, *, exit: int, **how: Any
) -> tuple[Classifier, Classifier]:
    """Swift and Super for labels, of one encoder.

    Args:
      model: with a task head and exits; static.
      params: its canonical parameters, which are not copied.
      tokenizer: of the model.
      exit: layer of the exit that is the Swift.
      **how: other arguments of `Classifier`, for both.

    Returns:
      (Swift, Super). The Super's answers to rows that the Swift has begun equal those from scratch.

    Raises:
      ValueError: the model has no such exit.
    """
    config, own = exit_encoder(model.config, params, exit)
    heads = {exit_name(layer) for layer in model.config.exits}
    whole = {name: tree for name, tree in params.items() if name not in heads}
    super_ = Encoder(dataclasses.replace(model.config, exits=()))
    swift = Classifier(Encoder(config), own, tokenizer, keep_state=True, **how)
    return swift, Classifier(super_, whole, tokenizer, **how)


def exit_model(config: ModelConfig, params: Params, layer: int) -> tuple[Decoder, Params]:
    """The ordinary smaller model that an exit of kind `norm` is, made of the same arrays.

    Args:
      config: a model with an exit after `layer`.
      params: its canonical parameters, which are not copied.
      layer: of the exit.

    Returns:
      (model, canonical parameters).

    Raises:
      ValueError: there is no such exit, or it is of another kind.
    """
    Part(config, layer)
    exit_config = next(e for e in config.exits if e.layer == layer)
    fix = "only an exit of kind 'norm' is a model of its own; attach one to generate from"
    require(exit_config.kind == "norm", f"exit after layer {layer}: kind", exit_config.kind, fix)
    own = params[exit_config.name]
    whole_head = {"kernel": params["embed"]["table"]} if config.tied else params["head"]
    names = ("embed", "positions", *(f"layers_{i}" for i in range(layer)))
    small = {name: params[name] for name in names if name in params}
    small |= {"final_norm": own["norm"], "head": whole_head if exit_config.tied else own["head"]}
    return Decoder(dataclasses.replace(config.with_layers(range(layer)), tied=False)), small


def _one_of(exit: int | None, subnet: Subnet | None) -> None:
    given = {"exit": exit, "subnet": subnet}
    require((exit is None) != (subnet is None), "swift", given, "name an exit or a subnet, one of them")


def _below(config: ModelConfig, exit: int | None) -> None:
    fix = f"the last of {config.n_layers} layers leaves nothing to a Super; name an earlier exit"
    require(exit is None or exit < config.n_layers, "exit", exit, fix)

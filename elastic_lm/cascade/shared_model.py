"""Members inside the Super: exits, or sub-networks, of the same checkpoint.

An exit's hidden state is the state that the remaining layers need. Records that are passed on to the Super
continue from it, and the Super costs what is left to do:

    h = layers_1..l (x)        Swift = exit_l(h)        Super = head(layers_l+1..L (h))

The Swift hands over states per record, not the caches of its batch: records that are passed on form new
batches.

A sub-network has states of its own, so the Super starts over. Its weights are slices of the Super's, cut
inside the programs; between calls one model's weights lie in memory either way. A program that reads known
tokens, for multiple choice and for scores, holds one layer's slice beside the model
(`known_tokens.score_tokens`). A program that generates holds the whole slice until its batch is done: slicing
every layer in every step would make half the width slower than all of it (measured on a CPU: 11.4 ms per
token, against 9.9 ms for the whole model and 4.8 ms for the half alone).
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from elastic_lm.cascade.classifier import Classifier
from elastic_lm.cascade.generator import Generator
from elastic_lm.cascade.known_tokens import ModelPart
from elastic_lm.cascade.multiple_choice import MultipleChoice
from elastic_lm.config.checks import require
from elastic_lm.config.decoding import MAX_NEW_TOKENS
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.results import TextTokenizer
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import BEFORE_LAYERS, Decoder, Params
from elastic_lm.models.encoder import Encoder, exit_name
from elastic_lm.models.exits import without_exits
from elastic_lm.models.task_heads import exit_encoder


def shared_multiple_choice(
    model: Decoder,
    params: Params,
    tokenizer: TextTokenizer,
    *,
    exit: int | None = None,
    subnet: Subnet | None = None,
    **options: Any,
) -> tuple[MultipleChoice, MultipleChoice]:
    """Makes Swift and Super for multiple choice of one model.

    Args:
      model: with the exit, where an exit is the Swift; its config is static under jit.
      params: its canonical parameters, which are not copied.
      tokenizer: of the model.
      exit: layer of the exit that is the Swift.
      subnet: the sub-network that is the Swift, instead of an exit.
      **options: other arguments of `MultipleChoice`, for both.

    Returns:
      (Swift, Super). The Super's answers to records that an exit has begun equal those from scratch, to float
      rounding.

    Raises:
      ValueError: not exactly one Swift is named, or the model has no such exit or sub-network.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.cascade import shared_multiple_choice
      from elastic_lm.data import train_bpe
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(exits=(1,), n_layers=2, vocab_size=260)
      params = random_params(config)  # `el.load(folder)` gives a trained model
      tokenizer = train_bpe(["some text"], 260)
      swift, super_ = shared_multiple_choice(el.Decoder(config), params, tokenizer, exit=1)

      records = [{"prompt": "The sky is", "choices": ["blue", "made of cheese"]}]
      quick = swift.answer(records)
      resumed, whole = super_.resume(records, quick), super_.answer(records)
      assert resumed[0].output == whole[0].output
      assert resumed[0].cost < whole[0].cost
      ```
    """
    _require_one_of(exit, subnet)
    _require_below_last(model.config, exit)
    shared = (model, params, tokenizer)
    parts = (subnet if exit is None else exit, None)
    swift, super_ = _sharing((_chooser(*shared, part, **options) for part in parts), parts)
    return swift, super_


def shared_generator(
    model: Decoder,
    params: Params,
    tokenizer: TextTokenizer,
    max_new_tokens: int = MAX_NEW_TOKENS,
    *,
    exit: int | None = None,
    subnet: Subnet | None = None,
    window: int = 1,
    **options: Any,
) -> tuple[Generator, Generator]:
    """Makes Swift and Super that generate, of one model.

    Args:
      model: with the exit, of kind `norm`, where an exit is the Swift; its config is static under jit.
      params: its canonical parameters, which are not copied.
      tokenizer: of the model.
      max_new_tokens: tokens of an answer at most.
      exit: layer of the exit that is the Swift. The Super continues from the exit's states of the prompt.
      subnet: the sub-network that is the Swift, instead of an exit.
      window: of the samplers; static under jit.
      **options: other arguments of `Generator`, for both.

    Returns:
      (Swift, Super). The Super gives no scores.

    Raises:
      ValueError: not exactly one Swift is named, or the model has no such exit or sub-network.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.cascade import shared_generator
      from elastic_lm.data import train_bpe
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(exits=(1,), n_layers=2, vocab_size=260)
      params = random_params(config)  # `el.load(folder)` gives a trained model
      tokenizer = train_bpe(["some text"], 260)
      swift, super_ = shared_generator(el.Decoder(config), params, tokenizer, 4, exit=1, batch_size=1)

      # "prompt_energy" is known before anything is generated, so the Swift generates what it keeps alone.
      cascade = el.Cascade(swift, super_, 1e9, score="prompt_energy")
      (result,) = cascade.answer([{"prompt": "import "}])
      assert (result.model, result.swift.output) == ("super", None)
      ```
    """
    _require_one_of(exit, subnet)
    _require_below_last(model.config, exit)
    shared, how = (model, params, tokenizer, max_new_tokens), {**options, "window": window}
    part = subnet if exit is None else exit
    members = (
        _generator(*shared, part=part, **how),
        _generator(*shared, part=None, **{**how, "scored": False}),
    )
    swift, super_ = _sharing(members, (part, None))
    return swift, super_


def _generator(
    model: Decoder,
    params: Params,
    tokenizer: TextTokenizer,
    max_new_tokens: int,
    *,
    part: int | Subnet | None,
    window: int = 1,
    **options: Any,
) -> Generator:
    """A part of a model that generates: the layers up to an exit, a sub-network, or all of it."""
    if isinstance(part, int):
        sampler = Sampler(*exit_model(model.config, params, part), tokenizer, window=window)
        scorer = (ModelPart(model.config, part), params)
        return Generator(sampler, max_new_tokens, scorer=scorer, keep_state=True, **options)

    # Full depth runs no exits, and a model without them needs no second pass over its prompts.
    config, whole_params = without_exits(model.config, params)
    how: dict[str, Any] = {} if part is None else {"subnet": part, "slice_inside": True}
    sampler = Sampler(Decoder(config), whole_params, tokenizer, window=window, **how)
    return Generator(sampler, max_new_tokens, **options)


def shared_classifier(
    model: Encoder, params: Params, tokenizer: Tokenizer, *, exit: int, **options: Any
) -> tuple[Classifier, Classifier]:
    """Makes Swift and Super for labels of one encoder.

    Args:
      model: with a task head and exits; its config is static under jit.
      params: its canonical parameters, which are not copied.
      tokenizer: of the model.
      exit: layer of the exit that is the Swift.
      **options: other arguments of `Classifier`, for both.

    Returns:
      (Swift, Super). The Super's answers to records that the Swift has begun equal those from scratch.

    Raises:
      ValueError: the model has no such exit.

    Example:
      ```python
      import jax

      import elastic_lm as el
      from elastic_lm.cascade import shared_classifier
      from elastic_lm.data import train_bpe

      shape = {"vocab_size": 260, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 32, "max_len": 64}
      config = el.EncoderConfig(**shape, n_labels=2, exits=(1,))
      params = el.init_params(config, jax.random.key(0))  # `el.load(folder)` gives a trained model
      swift, super_ = shared_classifier(el.Encoder(config), params, train_bpe(["some text"], 260), exit=1)

      results = el.Cascade(swift, super_, 0.9, score="max_prob").answer([{"text": "You won!"}])
      print(results[0].model, results[0].output, results[0].cost)
      ```
    """
    shared = (model, params, tokenizer)
    parts = (exit, None)
    swift, super_ = _sharing((_classifier(*shared, part, **options) for part in parts), parts)
    return swift, super_


def _classifier(
    model: Encoder, params: Params, tokenizer: Tokenizer, exit: int | None, **options: Any
) -> Classifier:
    """An encoder up to an exit, or all of it."""
    if exit is not None:
        config, own = exit_encoder(model.config, params, exit)
        return Classifier(Encoder(config), own, tokenizer, keep_state=True, **options)

    heads = {exit_name(layer) for layer in model.config.exits}
    whole = {name: tree for name, tree in params.items() if name not in heads}
    return Classifier(Encoder(dataclasses.replace(model.config, exits=())), whole, tokenizer, **options)


def shared_members(
    model: Decoder | Encoder,
    params: Params,
    tokenizer: Any,
    parts: Sequence[int | Subnet | None],
    *,
    max_new_tokens: int | None = None,
    scored_last: bool = True,
    **options: Any,
) -> tuple[Classifier | MultipleChoice | Generator, ...]:
    """Makes any number of members of one model, such as an exit, a sub-network and the whole.

    Exits and the whole model continue from what the exit before them has computed; a sub-network starts over,
    and what comes after it continues from the exit before it.

    Args:
      model: an encoder with a task head and exits, or a decoder; its config is static under jit.
      params: its canonical parameters, which are not copied.
      tokenizer: of the model.
      parts: of each member, in their order: the layer of an exit, a sub-network (of a decoder), or None = the
        whole model.
      max_new_tokens: of a decoder that generates; None = it chooses between the choices of a record.
      scored_last: whether the last one's answers have scores; where it is the last of its cascade, a
        generator saves their cost.
      **options: other arguments of `Classifier`, `MultipleChoice` or `Generator`, for all.

    Returns:
      The members, in the order of `parts`.

    Raises:
      ValueError: exits are not in increasing order, or the model has no such exit or sub-network.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.cascade import shared_members
      from elastic_lm.data import train_bpe
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(exits=(1,), n_layers=3, vocab_size=260)
      params = random_params(config)  # `el.load(folder)` gives a trained model
      half = el.Subnet.uniform(config, mlp=0.5)
      members = shared_members(
          el.Decoder(config), params, train_bpe(["some text"], 260), (1, half, None)
      )
      # Members of other kinds may follow, such as an `Endpoint`.
      cascade = el.Cascade(members[0], members[-1], (0.9, 0.7), between=members[1:-1], score="max_prob")
      (result,) = cascade.answer([{"prompt": "The sky is", "choices": ["blue", "made of cheese"]}])
      assert result.model in ("swift", "middle", "super")
      ```
    """
    require(bool(parts), "parts", parts, "name at least one")
    depths = [math.inf if part is None else part for part in parts if not isinstance(part, Subnet)]
    fix = "name exits in increasing order, and the whole model after them"
    require(depths == sorted(set(depths)), "parts", tuple(parts), fix)
    if isinstance(model, Encoder):
        exits = [part for part in parts if not isinstance(part, Subnet)]
        require(len(exits) == len(parts), "parts", tuple(parts), "an encoder has exits, and no sub-networks")
        return _sharing((_classifier(model, params, tokenizer, part, **options) for part in exits), parts)

    for part in parts:
        _require_below_last(model.config, None if isinstance(part, Subnet) else part)
    scored = [True] * (len(parts) - 1) + [scored_last]
    shared = (model, params, tokenizer)
    if max_new_tokens is not None:
        how = {"max_new_tokens": max_new_tokens, **options}
        made = (_generator(*shared, part=p, scored=s, **how) for p, s in zip(parts, scored, strict=True))
        return _sharing(made, parts)
    return _sharing((_chooser(*shared, part, **options) for part in parts), parts)


def _chooser(
    model: Decoder, params: Params, tokenizer: TextTokenizer, part: int | Subnet | None, **options: Any
) -> MultipleChoice:
    """A part of a decoder that chooses."""
    exit, subnet = (None, part) if isinstance(part, Subnet) else (part, None)
    how: dict[str, Any] = {"exit": exit, "subnet": subnet, "keep_state": exit is not None}
    return MultipleChoice(model, params, tokenizer, **how, **options)


Member = TypeVar("Member", Classifier, MultipleChoice, Generator)


def _sharing(members: Iterable[Member], parts: Sequence[int | Subnet | None]) -> tuple[Member, ...]:
    """Members of one model, marked so that they continue from each other's states, and from no others."""
    weights, found = object(), tuple(members)
    for member, part in zip(found, parts, strict=True):
        member.weights = None if isinstance(part, Subnet) else weights  # a sub-network has states of its own
    return found


def exit_model(config: ModelConfig, params: Params, layer: int) -> tuple[Decoder, Params]:
    """Makes the ordinary smaller model that an exit of kind `norm` is, of the same arrays.

    Args:
      config: a model with an exit after `layer`.
      params: its canonical parameters, which are not copied.
      layer: of the exit.

    Returns:
      (model, canonical parameters).

    Raises:
      ValueError: there is no such exit, or it is of another kind.
    """
    ModelPart(config, layer)  # checks that there is one
    exit_config = next(e for e in config.exits if e.layer == layer)
    require(
        exit_config.kind == "norm",
        f"exit after layer {layer}: kind",
        exit_config.kind,
        "only an exit of kind 'norm' is a model of its own; attach one to generate from",
    )

    own = params[exit_config.name]
    whole_head = {"kernel": params["embed"]["table"]} if config.tied else params["head"]
    names = (*BEFORE_LAYERS, *(f"layers_{i}" for i in range(layer)))
    small = {name: params[name] for name in names if name in params}
    small |= {"final_norm": own["norm"], "head": whole_head if exit_config.tied else own["head"]}
    # Not tied even if the whole model is: the head is named, and may be the exit's own.
    return Decoder(dataclasses.replace(config.with_layers(range(layer)), tied=False)), small


def _require_one_of(exit: int | None, subnet: Subnet | None) -> None:
    given = {"exit": exit, "subnet": subnet}
    require((exit is None) != (subnet is None), "swift", given, "name an exit or a subnet, one of them")


def _require_below_last(config: ModelConfig, exit: int | None) -> None:
    require(
        exit is None or exit < config.n_layers,
        "exit",
        exit,
        f"the last of {config.n_layers} layers leaves nothing to a Super; name an earlier exit",
    )

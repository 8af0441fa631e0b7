"""What an encoder answers a task with: heads and exits attached, and the smaller encoders inside it."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig, TaskProblem
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder import dense, exit_name


def attach_task_head(
    config: EncoderConfig,
    params: Params,
    n_labels: int,
    problem: TaskProblem,
    key: jax.Array,
    labels: Sequence[str] = (),
) -> tuple[EncoderConfig, Params]:
    """Gives an encoder a fresh task head in place of any it has, and a fresh pooler where it has none.

    Exits answer the old head's task and are left out.

    Args:
      config: the encoder.
      params: its canonical parameters.
      n_labels: classes, or values of a regression.
      problem: "classification" or "regression".
      key: typed PRNG key of the draw: kernels N(0, 0.02), biases 0.
      labels: names of the outputs; () = they have none.

    Returns:
      (config, canonical parameters) of the model with the head; other parameters are those given.

    Raises:
      ValueError: n_labels is below 1, or labels are not as many.
    """
    require(n_labels >= 1, "n_labels", n_labels, "must be at least 1")
    pooler = config.pooler
    if pooler == "none":
        pooler = "relu" if config.family == "distilbert" else "tanh"
    head = {"n_labels": n_labels, "problem": problem, "labels": tuple(labels), "pooler": pooler}
    new = dataclasses.replace(config, exits=(), **head)
    kept = {name: tree for name, tree in params.items() if name not in map(exit_name, config.exits)}
    fresh = {"head": n_labels} | ({} if "pooler" in params else {"pooler": config.d_model})
    inputs = jnp.zeros((1, config.d_model))
    keys = dict(zip(fresh, jax.random.split(key), strict=False))
    drawn = {name: dense(new, size).init(keys[name], inputs)["params"] for name, size in fresh.items()}
    return new, {**kept, **nn.unbox(drawn)}


def attach_task_exits(
    config: EncoderConfig, params: Params, exits: Sequence[int]
) -> tuple[EncoderConfig, Params]:
    """Gives an encoder exits after these layers and no others; those that it has there stay as they are.

    Args:
      config: an encoder with a task head.
      params: its canonical parameters, which are not copied.
      exits: layers in increasing order, counted from 1.

    Returns:
      (config, canonical parameters). A new exit begins with the model's own pooler and head.

    Raises:
      ValueError: the model has no task head, or no such layers below its last.
    """
    fix = "the model has no task head, which exits begin with; attach_task_head, or train one"
    require(config.n_labels > 0, "n_labels", config.n_labels, fix)
    new = dataclasses.replace(config, exits=tuple(exits))
    gone = {exit_name(layer) for layer in config.exits}
    kept = {name: tree for name, tree in params.items() if name not in gone}
    own = {"pooler": params["pooler"], "head": params["head"]}
    found = {name: params.get(name) or jax.tree.map(jnp.copy, own) for name in map(exit_name, exits)}
    return new, {**kept, **found}


def exit_encoder(config: EncoderConfig, params: Params, layer: int) -> tuple[EncoderConfig, Params]:
    """The ordinary smaller encoder that an exit is, made of the same arrays.

    Args:
      config: an encoder with an exit after `layer`.
      params: its canonical parameters, which are not copied.
      layer: of the exit.

    Raises:
      ValueError: there is no such exit.
    """
    fix = f"the model has exits after layers {config.exits or 'none'}; name one of them, or train it"
    require(layer in config.exits, "exit", layer, fix)
    small, kept = lowest_layers(config, params, layer)
    own = {name: tree for name, tree in kept.items() if name != "token_head"} | params[exit_name(layer)]
    return dataclasses.replace(small, mlm=False, pooling="mean"), own


def lowest_layers(config: EncoderConfig, params: Params, layers: int) -> tuple[EncoderConfig, Params]:
    """An encoder of the lowest layers of another, with its embeddings, pooler and heads, without its exits.

    Args:
      config: the whole encoder.
      params: its parameters; those that are kept are not copied.
      layers: how many are kept.

    Raises:
      ValueError: there are not as many.
    """
    require(1 <= layers <= config.n_layers, "layers", layers, f"the model has {config.n_layers} layers")
    gone = {f"layers_{i}" for i in range(layers, config.n_layers)} | set(map(exit_name, config.exits))
    kept = {name: tree for name, tree in params.items() if name not in gone}
    return dataclasses.replace(config, n_layers=layers, exits=()), kept

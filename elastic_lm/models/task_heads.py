"""Heads and exits that answer a task, attached to an encoder, and the smaller encoders inside it."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig, TaskProblem
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder import dense, exit_name
from elastic_lm.nn.encoder import Pooler

POOLER_OF = {"distilbert": "relu", "electra": "gelu", "deberta-v2": "gelu", "modernbert": "gelu"}


def attach_task_head(
    config: EncoderConfig,
    params: Params,
    n_labels: int,
    problem: TaskProblem,
    key: jax.Array,
    labels: Sequence[str] = (),
) -> tuple[EncoderConfig, Params]:
    """Gives an encoder a new task head in place of any it has, and a new pooler if it has none.

    Exits are left out, since they answer the old head's task.

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
      ValueError: `n_labels` is below 1, or there are labels, but not as many.

    Example:
      ```python
      import elastic_lm as el
      import jax

      config = el.EncoderConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_mlp=64)
      params = el.init_params(config, jax.random.key(0))
      config, params = el.attach_task_head(
          config, params, 2, "classification", jax.random.key(1), labels=("negative", "positive")
      )
      output = jax.jit(el.Encoder(config).apply)({"params": params}, jax.numpy.asarray([[2, 7, 5, 3]]))
      assert output.logits.shape == (1, 2)
      ```
    """
    require(n_labels >= 1, "n_labels", n_labels, "must be at least 1")

    pooler = config.pooler
    if pooler == "none":
        pooler = POOLER_OF.get(config.family, "tanh")
    new = dataclasses.replace(
        config, exits=(), n_labels=n_labels, problem=problem, labels=tuple(labels), pooler=pooler
    )

    modules = {"head": dense(new, n_labels)} | ({} if "pooler" in params else {"pooler": Pooler(new)})
    inputs = jnp.zeros((1, config.d_model))
    keys = dict(zip(modules, jax.random.split(key), strict=False))
    drawn = {name: module.init(keys[name], inputs)["params"] for name, module in modules.items()}

    kept = {name: tree for name, tree in params.items() if name not in map(exit_name, config.exits)}
    return new, {**kept, **nn.unbox(drawn)}


def attach_task_exits(
    config: EncoderConfig, params: Params, exits: Sequence[int]
) -> tuple[EncoderConfig, Params]:
    """Gives an encoder exits after these layers and no others; exits that it has there stay as they are.

    Args:
      config: an encoder with a task head.
      params: its canonical parameters, which are not copied.
      exits: layers in increasing order, counted from 1.

    Returns:
      (config, canonical parameters). A new exit begins with copies of the model's own pooler and head.

    Raises:
      ValueError: the model has no task head, or no such layers below its last.

    Example:
      ```python
      import elastic_lm as el
      import jax

      config = el.EncoderConfig(vocab_size=64, d_model=32, n_layers=4, n_heads=4, d_mlp=64, n_labels=2)
      params = el.init_params(config, jax.random.key(0))
      config, params = el.attach_task_exits(config, params, (1, 2))
      assert params["exit_1"].keys() == {"pooler", "head"}
      ```
    """
    require(
        config.n_labels > 0,
        "n_labels",
        config.n_labels,
        "the model has no task head, which exits begin with; attach_task_head, or train one",
    )
    new = dataclasses.replace(config, exits=tuple(exits))

    own = {"pooler": params["pooler"], "head": params["head"]}
    heads = {name: params.get(name) or jax.tree.map(jnp.copy, own) for name in map(exit_name, exits)}

    gone = {exit_name(layer) for layer in config.exits}
    kept = {name: tree for name, tree in params.items() if name not in gone}
    return new, {**kept, **heads}


def exit_encoder(config: EncoderConfig, params: Params, layer: int) -> tuple[EncoderConfig, Params]:
    """The ordinary smaller encoder that an exit is, made of the same arrays.

    Args:
      config: an encoder with an exit after `layer`.
      params: its canonical parameters, which are not copied.
      layer: where the exit is, counted from 1.

    Returns:
      (config, canonical parameters) of an encoder that ends with the exit's pooler and head.

    Raises:
      ValueError: there is no such exit.
    """
    require(
        layer in config.exits,
        "exit",
        layer,
        f"the model has exits after layers {config.exits or 'none'}; name one of them, or train it",
    )
    small, kept = lowest_layers(config, params, layer)
    own = {name: tree for name, tree in kept.items() if name != "token_head"} | params[exit_name(layer)]
    return dataclasses.replace(small, mlm=False, pooling="mean"), own


def lowest_layers(config: EncoderConfig, params: Params, layers: int) -> tuple[EncoderConfig, Params]:
    """An encoder of the lowest layers of another, with its embeddings, pooler and heads, without its exits.

    Args:
      config: the whole encoder.
      params: its canonical parameters; those that are kept are not copied.
      layers: how many are kept.

    Returns:
      (config, canonical parameters) of the smaller encoder.

    Raises:
      ValueError: there are fewer layers.
    """
    require(1 <= layers <= config.n_layers, "layers", layers, f"the model has {config.n_layers} layers")
    gone = {f"layers_{i}" for i in range(layers, config.n_layers)} | set(map(exit_name, config.exits))
    kept = {name: tree for name, tree in params.items() if name not in gone}
    return dataclasses.replace(config, n_layers=layers, exits=()), kept

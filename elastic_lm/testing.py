"""Tiny models and the properties that every elastic model keeps: for our tests and for yours."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.models.decoder import BEFORE_LAYERS, Decoder, Params
from elastic_lm.models.registry import Config, abstract_params

__all__ = [
    "all_logits",
    "assert_causal",
    "assert_exits_nested",
    "assert_same_tree",
    "final_head",
    "random_params",
    "random_tokens",
    "tiny_config",
    "truncated",
]


def tiny_config(exits: tuple[int, ...] = (), **overrides: Any) -> ModelConfig:
    """A four-layer Llama that compiles and runs in moments.

    Args:
      exits: layers after which to put an exit of kind `norm`.
      **overrides: any other field of `ModelConfig`.

    Returns:
      The config: d_model 32, 4 heads in 2 groups, vocabulary 64.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,), n_layers=6)
      assert config.exits == (el.ExitConfig(2, kind="norm"),)
      ```
    """
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "d_model": 32,
        "n_layers": 4,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_mlp": 64,
        "max_len": 128,
        "exits": tuple(ExitConfig(layer, kind="norm") for layer in exits),
    }
    return ModelConfig(**{**fields, **overrides})


def random_params(config: Config, seed: int = 0, scale: float = 0.3) -> Params:
    """Canonical parameters drawn from N(0, scale^2), biases and norms too; nothing is compiled.

    Args:
      config: architecture of any model.
      seed: of the draw.
      scale: standard deviation.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      params = el.testing.random_params(config)
      assert params["embed"]["table"].shape == (config.vocab_size, config.d_model)
      ```
    """
    draw = np.random.default_rng(seed).standard_normal
    shapes = nn.unbox(abstract_params(config))
    return jax.tree.map(lambda leaf: jnp.asarray(scale * draw(leaf.shape), leaf.dtype), shapes)


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> jax.Array:
    """Uniform token ids.

    Args:
      config: the model; decides about the range.
      batch: rows.
      length: tokens per row.
      seed: of the draw.

    Returns:
      [batch, length] int32.

    Example:
      ```python
      import elastic_lm as el

      tokens = el.testing.random_tokens(el.testing.tiny_config(), batch=2, length=5)
      assert tokens.shape == (2, 5)
      ```
    """
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, config.vocab_size)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> dict[int, jax.Array]:
    """Logits of every exit and of the full model in one forward pass.

    Args:
      config: the model; static.
      params: its canonical parameters.
      tokens_BT: int32 token ids.

    Returns:
      {depth: [B, T, V] float32}, the full model under `n_layers`.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      params = el.testing.random_params(config)
      logits = el.testing.all_logits(config, params, el.testing.random_tokens(config, 2, 5))
      assert list(logits) == [2, 4] and logits[2].shape == (2, 5, config.vocab_size)
      ```
    """
    output = Decoder(config).bind({"params": params})(tokens_BT)
    early = {e.layer: x for e, x in zip(config.exits, output.exit_logits, strict=True)}
    return {**early, config.n_layers: output.logits}


def assert_causal(config: ModelConfig, params: Params, length: int = 8) -> None:
    """Checks that no logits, of any exit, depend on a later token.

    Args:
      config: the model; static.
      params: its canonical parameters.
      length: tokens of the sequence that is probed.

    Raises:
      AssertionError: names the depth and the position that saw the future.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      params = el.testing.random_params(config)
      el.testing.assert_causal(config, params, length=3)
      ```
    """
    tokens = random_tokens(config, 1, length)
    before = all_logits(config, params, tokens)
    for changed in range(1, length):
        other = tokens.at[0, changed].set((tokens[0, changed] + 1) % config.vocab_size)
        for depth, logits in all_logits(config, params, other).items():
            same = np.array_equal(logits[0, :changed], before[depth][0, :changed])
            assert same, f"depth {depth}: a position before {changed} changed with token {changed}"


def truncated(config: ModelConfig, params: Params, layer: int) -> tuple[ModelConfig, Params]:
    """The ordinary smaller model that ends where the exit after `layer` reads.

    Args:
      config: a model with an exit of kind `norm` after `layer`.
      params: its canonical parameters.
      layer: depth of the exit.

    Returns:
      (config, params) of a model with `layer` layers, no exits, and the exit's norm and head.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      params = el.testing.random_params(config)
      small, small_params = el.testing.truncated(config, params, layer=2)
      assert small.n_layers == 2
      ```
    """
    exit_config = next(e for e in config.exits if e.layer == layer)
    own = params[exit_config.name]
    small = dataclasses.replace(config.with_layers(range(layer)), tied=False)
    head = final_head(config, params) if exit_config.tied else own["head"]
    names = [*BEFORE_LAYERS, *(f"layers_{i}" for i in range(layer))]
    kept = {name: params[name] for name in names if name in params}
    return small, {**kept, "final_norm": own["norm"], "head": head}


def final_head(config: ModelConfig, params: Params) -> Params:
    """The full model's vocabulary head, owned or tied.

    Args:
      config: the model.
      params: its canonical parameters.

    Returns:
      {"kernel": [V, D]}, and "bias" [V] if the head has one; not copied.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      params = el.testing.random_params(config)
      assert el.testing.final_head(config, params)["kernel"].shape == (config.vocab_size, config.d_model)
      ```
    """
    return {"kernel": params["embed"]["table"]} if config.tied else params["head"]


def assert_exits_nested(config: ModelConfig, params: Params, length: int = 8) -> None:
    """Checks that every `norm` exit is the ordinary model cut at its layer, to float rounding.

    Args:
      config: the model; static. Exit temperatures must be 1.
      params: its canonical parameters.
      length: tokens of the sequences that are compared.

    Raises:
      AssertionError: an exit's logits differ from the cut model's.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      params = el.testing.random_params(config)
      el.testing.assert_exits_nested(config, params, length=3)
      ```
    """
    tokens = random_tokens(config, 2, length)
    logits = all_logits(config, params, tokens)
    for exit_config in config.exits:
        small, small_params = truncated(config, params, exit_config.layer)
        cut = all_logits(small, small_params, tokens)[small.n_layers]
        np.testing.assert_allclose(logits[exit_config.layer], cut, rtol=1e-5, atol=1e-5)


def assert_same_tree(first: Params, second: Params) -> None:
    """Checks that two parameter trees are bit-identical.

    Args:
      first: a tree of arrays.
      second: another one.

    Raises:
      AssertionError: the trees have different keys, or a tensor differs; names the first one.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      params = el.testing.random_params(config)
      el.testing.assert_same_tree(params, el.testing.random_params(config, seed=0))
      ```
    """
    assert jax.tree.structure(first) == jax.tree.structure(second)
    leaves = jax.tree_util.tree_leaves_with_path(first)
    for (path, a), b in zip(leaves, jax.tree.leaves(second), strict=True):
        assert jnp.array_equal(a, b), f"{jax.tree_util.keystr(path)} differs"

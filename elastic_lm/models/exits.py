"""Exits attached to a model, and removed again."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.models.decoder import OUTSIDE, Params
from elastic_lm.models.placement import mesh_of
from elastic_lm.models.registry import abstract_params
from elastic_lm.models.sharding import param_shardings


def attach_exits(
    config: ModelConfig, params: Params, exits: Sequence[ExitConfig], key: jax.Array
) -> tuple[ModelConfig, Params]:
    """Adds exits to a model; what the model computes at its last layer stays bit-identical.

    A copied exit starts from the vocabulary head (the embedding table if that is the head), the final norm
    (`linear`: as its affine map, beside which the MLP adds nothing yet), the MLP of the same layer (`mlp`)
    and the last layer (`block`). `init="fit"` copies as well: `depth.fit_exits`, or the run that trains the
    exit, fits it afterwards.

    A random exit after layer l draws N(0, 0.02), output projections / sqrt(2 l), with identity norms and zero
    biases. A gate has nothing to be copied from and draws N(0, 1 / inputs).

    Args:
      config: the model; exits it already has are kept.
      params: its parameters, canonical or stacked. No array of them is copied or changed.
      exits: what to add; `ExitConfig.init` decides between copying and drawing.
      key: typed PRNG key, read by random exits only.

    Returns:
      (config with the exits, parameters with one more sub-tree per exit).

    Raises:
      ValueError: two exits share a layer, one lies above the last layer, or a `block` would be copied to
        a layer of other sizes than the last.

    Example:
      ```python
      import elastic_lm as el
      import jax

      config = el.testing.tiny_config()
      params = el.testing.random_params(config)
      exits = [el.ExitConfig(2, kind="norm"), el.ExitConfig(3, kind="mlp", gate=8)]
      config, params = el.attach_exits(config, params, exits, jax.random.key(0))
      assert params["exit_3"].keys() == {"norm", "mlp", "head", "gate"}
      ```
    """
    new = config.with_exits(tuple(sorted((*config.exits, *exits), key=lambda e: e.layer)))
    shapes = nn.unbox(abstract_params(new))
    grown, mesh = dict(params), mesh_of(params)
    for e in exits:
        if e.name not in shapes:  # tied `embedding` exits own nothing
            continue

        if e.init != "random":
            # Copies lie where their sources do.
            grown[e.name] = jax.tree.map(jnp.copy, _sources(config, params, e))
            drawn = {name: tree for name, tree in shapes[e.name].items() if name not in grown[e.name]}
        else:
            drawn = shapes[e.name]
        # None is a leaf here, and stands for the default device.
        places = jax.tree.map(lambda leaf: None, drawn)
        if mesh is not None:
            every = param_shardings(new, mesh)[e.name]
            places = {name: every[name] for name in drawn}
        key_of_exit = jax.random.fold_in(key, e.layer)
        grown.setdefault(e.name, {}).update(_draw(config, e, drawn, places, key_of_exit))
    return new, grown


def without_exits(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The model alone, the inverse of `attach_exits`.

    Args:
      config: the model with any exits.
      params: its parameters, canonical or stacked. No array is copied.

    Returns:
      (config without exits, parameters without theirs).

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      params = el.testing.random_params(config)
      config, params = el.depth.without_exits(config, params)
      assert config.exits == () and "exit_2" not in params
      ```
    """
    owned = {e.name for e in config.exits}
    return config.with_exits(()), {name: tree for name, tree in params.items() if name not in owned}


def _sources(config: ModelConfig, params: Params, e: ExitConfig) -> Params:
    """The pretrained modules that a copied exit starts from."""
    modules: Params = {}
    if e.kind == "linear":
        # The final norm as an affine map of the normalised state.
        norm = params["final_norm"]
        bias = norm["bias"] if "bias" in norm else jnp.zeros_like(norm["scale"])
        scale = norm["scale"].astype(jnp.float32) + config.norm_offset
        modules["map"] = {"kernel": jnp.diag(scale).astype(norm["scale"].dtype), "bias": bias}
    elif e.kind != "embedding":
        modules["norm"] = params["final_norm"]
    if e.kind == "mlp":
        modules["mlp"] = _layer(params, e.layer - 1)["mlp"]
    if e.kind == "block":
        own, last = config.sizes(e.layer - 1), config.sizes(config.n_layers - 1)
        require(
            own == last,
            "exit.init",
            e.init,
            f"layer {e.layer} has sizes {own} and the last layer, to be copied, {last}; set init='random'",
        )
        modules["block"] = _layer(params, config.n_layers - 1)
    if not e.tied:
        modules["head"] = {"kernel": params["embed"]["table"]} if config.tied else params["head"]
    return modules


def _layer(params: Params, index: int) -> Params:
    """Parameters of one layer, from either form."""
    if "layers" in params:
        return jax.tree.map(lambda leaf: leaf[index], params["layers"])
    return params[f"layers_{index}"]


def _draw(config: ModelConfig, e: ExitConfig, shapes: Params, places: Params, key: jax.Array) -> Params:
    """Random parameters of one exit, each born in its place; None = the default device."""
    draws = []
    found = jax.tree.leaves(places, is_leaf=lambda place: place is None)
    leaves = zip(jax.tree_util.tree_leaves_with_path(shapes), found, strict=True)
    for i, ((path, leaf), place) in enumerate(leaves):
        names = [entry.key for entry in path]
        if names[-1] == "scale":
            draws.append(jnp.full(leaf.shape, 1.0 - config.norm_offset, leaf.dtype, device=place))
        elif names[-1] == "bias":
            draws.append(jnp.zeros(leaf.shape, leaf.dtype, device=place))
        else:
            deviation = 0.02 / (2 * e.layer) ** 0.5 if names[-2] in ("out", "down") else 0.02
            # The MLP beside a copied map starts by adding nothing.
            if e.kind == "linear" and e.init != "random" and names[-2:] == ["down", "kernel"]:
                deviation = 0.0
            # A gate is small and trains for few steps, so it starts at the scale of its input.
            if names[0] == "gate":
                deviation = leaf.shape[-1] ** -0.5
            noise = _normal(jax.random.fold_in(key, i), leaf.shape, place)
            draws.append((deviation * noise).astype(leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(shapes), draws)


def _normal(key: jax.Array, shape: tuple[int, ...], place: Any) -> jax.Array:
    """`jax.random.normal` in its place. Compiled alone, so that no product with it rounds otherwise."""
    if place is None:
        return jax.random.normal(key, shape)
    return jax.jit(lambda key: jax.random.normal(key, shape), out_shardings=place)(key)


def extract(config: ModelConfig, params: Params, n: int) -> tuple[ModelConfig, Params]:
    """The ordinary model made of the first n layers, the final norm and the head.

    Args:
      config: the model; its exits are left out.
      params: its parameters, canonical or stacked. No array is copied unless stacked.
      n: layers to keep, 1 .. n_layers.

    Returns:
      (config of n layers, its parameters in the same form).

    Raises:
      ValueError: the model does not have n layers.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      small, params = el.depth.extract(config, el.testing.random_params(config), 2)
      assert (small.n_layers, small.exits) == (2, ())
      ```
    """
    if not 1 <= n <= config.n_layers:
        raise ValueError(f"n={n}: the model has {config.n_layers} layers; keep between 1 and all of them")
    small = config.with_layers(range(n))
    names = [*OUTSIDE, *(f"layers_{i}" for i in range(n))]
    kept = {name: params[name] for name in names if name in params}
    if "layers" in params:
        kept["layers"] = jax.tree.map(lambda leaf: leaf[:n], params["layers"])
    return small, kept

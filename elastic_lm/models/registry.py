"""The kinds of model, told apart by the class of their config, and the parameters of new models."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.models import decoder, encoder_decoder
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.encoder import Encoder
from elastic_lm.models.encoder_decoder import EncoderDecoder

Config = ModelConfig | EncoderConfig | EncoderDecoderConfig
Model = Decoder | Encoder | EncoderDecoder


@dataclasses.dataclass(frozen=True)
class Kind:
    """What creating, loading and saving need to know of one kind of model.

    Attributes:
      name: what elastic_config.json says.
      config: class of the configs.
      model: config -> Linen module.
      inputs: how many arrays of tokens the model reads.
      draw: (config, key, path, shape and dtype) -> one new parameter; None = as its module says.
    """

    name: str
    config: type
    model: Callable[[Any], Model]
    inputs: int = 1
    draw: Callable[[Any, jax.Array, list[str], jax.ShapeDtypeStruct], jax.Array] | None = None


DECODER = Kind("decoder", ModelConfig, Decoder, draw=decoder.draw_param)
ENCODER = Kind("encoder", EncoderConfig, Encoder)
ENCODER_DECODER = Kind(
    "encoder_decoder", EncoderDecoderConfig, EncoderDecoder, inputs=2, draw=encoder_decoder.draw_param
)
KINDS = {kind.name: kind for kind in (DECODER, ENCODER, ENCODER_DECODER)}


def kind_of(config: Config) -> Kind:
    """The kind of model that a config describes.

    Raises:
      TypeError: the config describes no model.
    """
    for kind in KINDS.values():
        if type(config) is kind.config:
            return kind
    known = ", ".join(kind.config.__name__ for kind in KINDS.values())
    raise TypeError(f"config={config!r}: describes no model; it must be of type {known}")


def make_model(config: Config) -> Model:
    """The Linen module of a config (static)."""
    return kind_of(config).model(config)


@functools.lru_cache(maxsize=32)
def abstract_params(config: Config) -> Params:
    """Shapes, dtypes and logical axis names of the canonical parameters of any model, without memory.

    Args:
      config: the model; static.

    Returns:
      A tree of `flax.linen.LogicallyPartitioned` boxes around `jax.ShapeDtypeStruct`.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    inputs = [tokens] * kind_of(config).inputs
    return jax.eval_shape(make_model(config).init, jax.random.key(0), *inputs)["params"]


def unboxed(params: Params) -> Params:
    """Parameters without the boxes of `model.init`, which name axes; the same tree where it has none."""

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.meta.AxisMetadata)

    return nn.unbox(params) if any(map(is_box, jax.tree.leaves(params, is_leaf=is_box))) else params


def check_params(config: Config, params: Params) -> None:
    """Checks that parameters are those of a model, canonical; further ones, as of exits, may be there.

    Args:
      config: the model.
      params: its parameters.

    Raises:
      ValueError: one is missing or has another shape; names it.
    """
    if not any(type(config) is kind.config for kind in KINDS.values()):
        return  # of a model whose parameters are arranged in another way, as `width.nested_decoder`
    leaves, _ = jax.tree_util.tree_flatten_with_path(nn.unbox(abstract_params(config)))
    params = unboxed(params)
    for path, leaf in leaves:
        found: Any = params
        for entry in path:
            found = found.get(entry.key) if isinstance(found, Mapping) else None
        name, shape = "/".join(entry.key for entry in path), getattr(found, "shape", None)
        fix = f"the model has {leaf.shape} there; give the canonical parameters of this model"
        require(shape == leaf.shape, f"shape of params {name}", shape, fix)


def init_params(
    config: Config, key: jax.Array, *, shardings: Params | None = None, stacked: bool = False
) -> Params:
    """Draws parameters of any model: kernels and tables random, biases 0, norms the identity.

    Encoders draw N(0, 0.02); decoders scale the outputs of attention and MLP down (`decoder.draw_param`), and
    encoder-decoders have T5's deviations (`encoder_decoder.draw_param`).

    Args:
      config: the model; static.
      key: typed PRNG key. Every parameter's draw depends on the key and on its place in the tree alone.
      shardings: where each parameter is born (`models.sharding`), so that no device holds more than its part;
        None = the default device.
      stacked: give the form that training scans over (`stack_layers`), which draws the layers' parameters
        together; for decoders of layers of one size. The numbers are the same.

    Returns:
      Parameters, unboxed.

    Raises:
      TypeError: the config describes no model.

    Example:
      ```python
      import jax
      import elastic_lm as el

      config = el.testing.tiny_config()
      params = el.init_params(config, jax.random.key(0))
      assert params["embed"]["table"].shape == (config.vocab_size, config.d_model)
      ```
    """
    kind = kind_of(config)
    if kind.draw is None:
        inputs = [jnp.zeros((1, 1), jnp.int32)] * kind.inputs
        init = make_model(config).init
        if shardings is None:
            return nn.unbox(jax.jit(init)(key, *inputs)["params"])
        return jax.jit(lambda *given: nn.unbox(init(*given)["params"]), out_shardings=shardings)(key, *inputs)

    draw_param = kind.draw
    leaves, tree = jax.tree_util.tree_flatten_with_path(nn.unbox(abstract_params(config)))

    def draw(key: jax.Array) -> list[jax.Array]:
        return [
            draw_param(config, jax.random.fold_in(key, i), [entry.key for entry in path], leaf)
            for i, (path, leaf) in enumerate(leaves)
        ]

    if stacked:
        draw_all = functools.partial(_draw_stacked, config, draw_param, leaves)
        return jax.jit(draw_all, out_shardings=shardings)(key)
    places = None if shardings is None else jax.tree.leaves(shardings)
    return jax.tree.unflatten(tree, jax.jit(draw, out_shardings=places)(key))


def _draw_stacked(
    config: Config, draw_param: Callable[..., jax.Array], leaves: list[tuple[Any, Any]], key: jax.Array
) -> Params:
    """What `init_params` draws, with the layers stacked."""
    params: Params = {}
    layers: dict[tuple[str, ...], dict[int, int]] = {}  # path within a layer -> {layer: place in the tree}
    for i, (path, leaf) in enumerate(leaves):
        names = tuple(entry.key for entry in path)
        layer = decoder.LAYER.fullmatch(names[0])
        if layer:
            layers.setdefault(names[1:], {})[int(layer[1])] = i
        else:
            drawn = draw_param(config, jax.random.fold_in(key, i), list(names), leaf)
            _insert(params, names, drawn)

    for names, places in layers.items():
        path, leaf = leaves[places[0]]
        one = functools.partial(draw_param, config, path=[entry.key for entry in path], leaf=leaf)
        drawn = jax.vmap(lambda i, one=one: one(key=jax.random.fold_in(key, i)))(
            jnp.asarray([places[layer] for layer in sorted(places)], jnp.uint32)
        )
        _insert(params, ("layers", *names), drawn)
    return params


def _insert(params: Params, names: tuple[str, ...], leaf: jax.Array) -> None:
    for name in names[:-1]:
        params = params.setdefault(name, {})
    params[names[-1]] = leaf

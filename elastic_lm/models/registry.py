"""The kinds of model, told apart by the class of their config."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.models import decoder, encoder, encoder_decoder
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.encoder import Encoder
from elastic_lm.models.encoder_decoder import EncoderDecoder

Config = ModelConfig | EncoderConfig | EncoderDecoderConfig
Model = Decoder | Encoder | EncoderDecoder


@dataclasses.dataclass(frozen=True)
class Kind:
    """What loading, saving and placing need to know of one kind of model.

    Attributes:
      name: what elastic_config.json says.
      config: class of the configs.
      model: config -> Linen module.
      abstract_params: config -> boxes around shapes; see `decoder.abstract_params`.
      init_params: (config, key) -> parameters; see `decoder.init_params`.
    """

    name: str
    config: type
    model: Callable[[Any], Model]
    abstract_params: Callable[[Any], Params]
    init_params: Callable[[Any, jax.Array], Params]


DECODER = Kind("decoder", ModelConfig, Decoder, decoder.abstract_params, decoder.init_params)
ENCODER = Kind("encoder", EncoderConfig, Encoder, encoder.abstract_params, encoder.init_params)
ENCODER_DECODER = Kind(
    "encoder_decoder",
    EncoderDecoderConfig,
    EncoderDecoder,
    encoder_decoder.abstract_params,
    encoder_decoder.init_params,
)
KINDS = {kind.name: kind for kind in (DECODER, ENCODER, ENCODER_DECODER)}


def kind_of(config: Config) -> Kind:
    """The kind of model that a config describes.

    Raises:
      TypeError: it describes none.
    """
    found = next((kind for kind in KINDS.values() if type(config) is kind.config), None)
    if found is None:
        known = ", ".join(kind.config.__name__ for kind in KINDS.values())
        raise TypeError(f"config={config!r}: describes no model; it must be of type {known}")
    return found


def make_model(config: Config) -> Model:
    """The Linen module of a config (static)."""
    return kind_of(config).model(config)


def abstract_params(config: Config) -> Params:
    """Shapes, dtypes and logical axis names of the canonical parameters of any model, without memory.

    Args:
      config: the model; static.

    Returns:
      A tree of `flax.linen.LogicallyPartitioned` boxes around `jax.ShapeDtypeStruct`.
    """
    return kind_of(config).abstract_params(config)


def init_params(config: Config, key: jax.Array) -> Params:
    """Draws canonical parameters of any model.

    Args:
      config: the model; static.
      key: typed PRNG key.

    Returns:
      Canonical parameters, unboxed.
    """
    return kind_of(config).init_params(config, key)

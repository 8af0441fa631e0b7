"""Bytes of a model's arrays, from their shapes alone: what a device holds, and what a decoded token reads."""

import functools
import math

import flax.linen as nn
import jax

from elastic_lm.config.model import ModelConfig
from elastic_lm.models.decoder import Params
from elastic_lm.models.registry import abstract_params
from elastic_lm.nn.int8 import quantised, to_int8


def stored_bytes(config: ModelConfig, weights: str | None = None) -> int:
    """Bytes of all parameters.

    Args:
      config: the model; static.
      weights: "int8" = kernels and tables in 8 bits (`nn.int8`); None = all in the model's `param_dtype`.
    """
    return _bytes(_shapes(config, weights))


def step_bytes(config: ModelConfig, weights: str | None = None) -> int:
    """Bytes of parameters that a token at full depth reads: layers, final norm and vocabulary head.

    Args:
      config: the model; static. Exits are not read.
      weights: as in `stored_bytes`.
    """
    params = _shapes(config.with_exits(()), weights)
    looked_up = () if config.tied else ("embed",)
    return _bytes({name: tree for name, tree in params.items() if name not in (*looked_up, "positions")})


def _shapes(config: ModelConfig, weights: str | None) -> Params:
    params = nn.unbox(abstract_params(config))
    narrow = functools.partial(quantised, convert=functools.partial(jax.eval_shape, to_int8))
    return narrow(params) if weights == "int8" else params


def _bytes(params: Params) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))

"""A tokenizer and weights for the models of test cascades."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.models.decoder import Params
from elastic_lm.models.registry import Config, abstract_params


class Letters:
    """A token per character, of 63; token 0 begins a text."""

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [0] * bos + [ord(c) % 63 + 1 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(63 + (i - 1) % 63) for i in ids if i)


def drawn(config: Config, scale: float = 0.2) -> Params:
    """Parameters of any kind of model from N(0, scale^2); nothing is compiled."""
    draw = np.random.default_rng(0).standard_normal
    shapes = nn.unbox(abstract_params(config))
    return jax.tree.map(lambda leaf: jnp.asarray(scale * draw(leaf.shape), leaf.dtype), shapes)

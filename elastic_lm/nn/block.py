"""One transformer layer: attention and MLP around the residual stream."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.nn.attention import Attention, KeyValues, NewKeyValues
from elastic_lm.nn.mlp import MLP
from elastic_lm.nn.norm import Norm


@flax.struct.dataclass
class Tap:
    """What a layer offers to an exit that sits after it.

    Attributes:
      hidden: [B, T, D] output of the layer, h_l.
      residual: [B, T, D] what the layer's MLP output is added to, a_l.
      mlp_input: [B, T, D] normalised input of the layer's MLP.
      entering: [B, T, D] input of the layer, h_{l-1}.
    """

    hidden: jax.Array
    residual: jax.Array
    mlp_input: jax.Array
    entering: jax.Array

    def skipped(self, keep_B: jax.Array | None) -> "Tap":
        """The same with the layer left out for rows where boolean `keep_B` is False; None leaves none out."""
        if keep_B is None:
            return self
        return dataclasses.replace(self, hidden=jnp.where(keep_B[:, None, None], self.hidden, self.entering))


def make_norm(c: ModelConfig, name: str) -> Norm:
    """A normalisation of the model's kind.

    Args:
      c: the model; static.
      name: key of its parameters.

    Returns:
      The module, over the last axis of its input.
    """
    return Norm(c.norm, c.norm_eps, c.norm_offset, c.param_dtype, c.norm_width, name=name)


class Block(nn.Module):
    """a = x + attn(norm(x)); y = a + mlp(norm(a)); or both from x (parallel residual)."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.attn_norm = make_norm(c, "attn_norm")
        self.attn = Attention(c, name="attn")
        self.mlp_norm = make_norm(c, "mlp_norm")
        self.mlp = MLP(c, name="mlp")
        if c.sandwich_norm:
            self.post_attn_norm = make_norm(c, "post_attn_norm")
            self.post_mlp_norm = make_norm(c, "post_mlp_norm")

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        *,
        window: int | jax.Array = 0,
        segments_BT: jax.Array | None = None,
        past: KeyValues | None = None,
    ) -> tuple[Tap, NewKeyValues]:
        """Runs the layer.

        Args:
          x_BTD: input of the layer, h_{l-1}.
          positions_BT: int32 positions of the new tokens.
          window: see `attend`.
          segments_BT: document ids of the new tokens, or None.
          past: the layer's cached keys and values, or None.

        Returns:
          (Tap with the layer's output and what exits need, (k [B, K, T, H], v [B, K, T, H])).
        """

        def attention(x_BTD: jax.Array) -> tuple[jax.Array, NewKeyValues]:
            return self.attn(x_BTD, positions_BT, window=window, segments_BT=segments_BT, past=past)

        return self.around(x_BTD, attention, self.mlp)

    def around(
        self,
        x_BTD: jax.Array,
        attention: Callable[[jax.Array], tuple[jax.Array, NewKeyValues]],
        mlp: Callable[[jax.Array], jax.Array],
    ) -> tuple[Tap, NewKeyValues]:
        """The layer with any attention and any MLP in it, both maps of normalised input [B, T, D].

        Args:
          x_BTD: input of the layer.
          attention: gives its output and the new keys and values.
          mlp: gives its output.
        """
        attended, new_kv = attention(self.attn_norm(x_BTD))
        if self.config.sandwich_norm:
            attended = self.post_attn_norm(attended)
        residual = x_BTD + attended
        mlp_input = self.mlp_norm(x_BTD if self.config.parallel_residual else residual)
        hidden = self.add_mlp(residual, mlp(mlp_input))
        return Tap(hidden, residual, mlp_input, x_BTD), new_kv

    def key_values(self, x_BTD: jax.Array, positions_BT: jax.Array) -> NewKeyValues:
        """Keys and values that this layer would have for an input, and nothing else.

        Args:
          x_BTD: input of the layer.
          positions_BT: int32 positions of its tokens.

        Returns:
          (k [B, K, T, H], v [B, K, T, H]).
        """
        return self.attn(self.attn_norm(x_BTD), positions_BT)[1]

    def add_mlp(self, residual_BTD: jax.Array, mlp_BTD: jax.Array) -> jax.Array:
        """Adds an MLP's output to the residual stream the way this layer does.

        An `mlp` exit joins its own branch through here, beside the layer's own MLP.

        Args:
          residual_BTD: what the output is added to, a_l.
          mlp_BTD: output of an MLP.

        Returns:
          [B, T, D] output of the layer.
        """
        if self.config.sandwich_norm:
            mlp_BTD = self.post_mlp_norm(mlp_BTD)
        return residual_BTD + mlp_BTD

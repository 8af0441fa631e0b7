"""One transformer layer: attention and MLP around the residual stream.

    a = x + attn(norm(x))                     what the layer's MLP output is added to
    y = a + mlp(norm(a))                      the layer's output
    y = a + mlp(norm(x))                      with a parallel residual (GPT-NeoX), whose two norms may be one

Sandwich norms (Gemma 2) normalise the outputs of attention and MLP too, before they are added. OLMo 2 has no
others. Granite multiplies what is added.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.nn.attention import Attention, AttentionContext, NewKeyValues
from elastic_lm.nn.mlp import MLP
from elastic_lm.nn.norm import Norm
from elastic_lm.nn.placement import by_rows
from elastic_lm.nn.sequence import divided


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


class Block(nn.Module):
    """One layer of a decoder, which exits of kind `block` have too."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.attn_norm = make_norm(c, "attn_norm") if c.pre_norm else unchanged
        self.attn = Attention(c, name="attn")
        if not c.shared_norm:
            self.mlp_norm = make_norm(c, "mlp_norm") if c.pre_norm else unchanged
        self.mlp = MLP(c, name="mlp")
        if c.sandwich_norm:
            self.post_attn_norm = make_norm(c, "post_attn_norm")
            self.post_mlp_norm = make_norm(c, "post_mlp_norm")

    def __call__(self, x_BTD: jax.Array, context: AttentionContext) -> tuple[Tap, NewKeyValues]:
        """Runs the layer.

        Args:
          x_BTD: input of the layer, h_{l-1}.
          context: positions of the tokens, and what they see.

        Returns:
          (Tap with the layer's output and what exits need, new keys and values).
        """
        return self.around(x_BTD, lambda x_BTD: self.attn(x_BTD, context), self.mlp)

    def around(
        self,
        x_BTD: jax.Array,
        attention: Callable[[jax.Array], tuple[jax.Array, NewKeyValues]],
        mlp: Callable[[jax.Array], jax.Array],
    ) -> tuple[Tap, NewKeyValues]:
        """The layer's norms and residual sums around any attention and any MLP.

        Layers of many widths (`width.switched`, `width.nested`, `width.gated`) differ from this one in
        nothing else.

        Args:
          x_BTD: input of the layer.
          attention: from normalised input [B, T, D] to its output [B, T, D] and new keys and values.
          mlp: from normalised input [B, T, D] to its output [B, T, D].

        Returns:
          As `__call__`.
        """
        x_BTD = by_rows(x_BTD)
        c, normed = self.config, self.attn_norm(x_BTD)
        attended, new_kv = attention(normed)
        if c.sandwich_norm:
            attended = self.post_attn_norm(attended)
        residual = by_rows(x_BTD + scaled(attended, c.residual_scale))

        mlp_input = normed if c.shared_norm else self.mlp_norm(x_BTD if c.parallel_residual else residual)
        hidden = divided(self.add_mlp(residual, mlp(mlp_input)))
        return Tap(hidden, residual, mlp_input, entering=x_BTD), new_kv

    def add_mlp(self, residual_BTD: jax.Array, mlp_BTD: jax.Array) -> jax.Array:
        """Adds an MLP's output to the residual stream the way this layer does.

        An exit of kind `mlp` joins its own branch through here, beside the layer's own MLP.

        Args:
          residual_BTD: what the output is added to, a_l.
          mlp_BTD: output of an MLP.

        Returns:
          [B, T, D] output of the layer.
        """
        if self.config.sandwich_norm:
            mlp_BTD = self.post_mlp_norm(mlp_BTD)
        return by_rows(residual_BTD + scaled(mlp_BTD, self.config.residual_scale))

    def key_values(self, x_BTD: jax.Array, positions_BT: jax.Array) -> NewKeyValues:
        """Keys and values that this layer would have for an input.

        Args:
          x_BTD: input of the layer.
          positions_BT: int32 positions of its tokens.
        """
        # Under jit, XLA drops the attention itself, whose output is not used.
        return self.attn(self.attn_norm(x_BTD), AttentionContext(positions_BT))[1]


def unchanged(x_BTD: jax.Array) -> jax.Array:
    """In the place of a norm that a model does not have."""
    return x_BTD


def scaled(x: jax.Array, scale: float) -> jax.Array:
    """`x` times a float32 number (static), rounded once."""
    return x if scale == 1.0 else (x.astype(jnp.float32) * scale).astype(x.dtype)


def make_norm(c: ModelConfig, name: str) -> Norm:
    """A normalisation of the model's kind, over the last axis of its input.

    Args:
      c: the model; static.
      name: key of its parameters.
    """
    return Norm(c.norm, c.norm_eps, c.norm_offset, c.param_dtype, c.norm_width, c.norm_bias, name=name)

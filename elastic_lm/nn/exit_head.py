"""Exit heads: from the state after layer l to features for a vocabulary head (EE-Tuning, sec. 2.1)."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.nn.attention import AttentionContext, NewKeyValues
from elastic_lm.nn.block import Block, Tap, make_norm
from elastic_lm.nn.linear import Linear
from elastic_lm.nn.mlp import MLP
from elastic_lm.nn.norm import layer_norm, rms_norm
from elastic_lm.nn.vocab_head import VocabHead


class Exit(nn.Module):
    """One early exit after layer l, in the four kinds of EE-Tuning and an affine one.

    - embedding: features = h_l
    - norm:      features = Norm(h_l)
    - linear:    features = A u_l + b (+ MLP_exit(u_l)), u_l = Norm(h_l) without scale and bias
    - mlp:       features = Norm(a_l + MLP_exit(N2(a_l))), a second MLP beside the layer's own
    - block:     features = Norm(Block_exit(h_l)), with its own keys and values

    MLP_exit and Block_exit have the sizes of layer l; beside an affine map, MLP_exit is as wide as the exit's
    config says (Tuned Lens, arXiv 2303.08112, is the map alone).
    """

    config: ModelConfig
    exit: ExitConfig

    def setup(self) -> None:
        layer = self.config.layer(self.exit.layer - 1)
        if self.exit.kind == "mlp":
            self.mlp = MLP(layer, name="mlp")
        if self.exit.kind == "block":
            # It begins as a copy of the last layer, and rotates like it.
            last = self.config.layer(self.config.n_layers - 1)
            block = dataclasses.replace(layer, rope=last.rope, rotated=last.rotated)
            self.block = Block(block, name="block")
        if self.exit.kind == "linear":
            d, dtype = self.config.d_model, self.config.param_dtype
            self.map = Linear((d,), (None, "embed"), True, dtype, name="map")
            if self.exit.hidden:
                # Its neurons are not ranked, so that they need not fill the layer's storage groups.
                beside = dataclasses.replace(
                    layer, d_mlp=self.exit.hidden, layer_mlp=(), elastic_groups=0, gated=True
                )
                self.mlp = MLP(beside, name="mlp")
        elif self.exit.kind != "embedding":
            self.norm = make_norm(self.config, "norm")
        if not self.exit.tied:
            self.head = VocabHead(self.config, name="head")
        if self.exit.gate:
            self.gate = Gate(self.config, self.exit.gate, name="gate")

    def state(self, tap: Tap, context: AttentionContext) -> tuple[jax.Array, NewKeyValues | None]:
        """Runs the exit's own block, if it has one.

        Args:
          tap: what layer l offers.
          context: positions of the tokens, and what they see in the exit's own block.

        Returns:
          (h [B, T, D] that leaves the block or the layer, new keys and values or None).
        """
        if self.exit.kind != "block":
            return tap.hidden, None
        tap, new_kv = self.block(tap.hidden, context)
        return tap.hidden, new_kv

    def features(
        self,
        hidden_BTD: jax.Array,
        tap: Tap,
        add_mlp: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """Input [B, T, D] of the exit's vocabulary head.

        Args:
          hidden_BTD: first result of `state`.
          tap: what layer l offers.
          add_mlp: `Block.add_mlp` of layer l.
        """
        if self.exit.kind == "linear":
            unit_BTD = unit_norm(self.config, hidden_BTD)
            features_BTD = self.map(unit_BTD)
            return features_BTD + self.mlp(unit_BTD) if self.exit.hidden else features_BTD
        if self.exit.kind == "mlp":
            hidden_BTD = add_mlp(tap.residual, self.mlp(tap.mlp_input))
        return hidden_BTD if self.exit.kind == "embedding" else self.norm(hidden_BTD)

    def key_values(self, hidden_BTD: jax.Array, positions_BT: jax.Array) -> NewKeyValues | None:
        """Keys and values that the exit's own block would have; None if it has no block.

        Args:
          hidden_BTD: output of layer l.
          positions_BT: int32 positions of its tokens.
        """
        return self.block.key_values(hidden_BTD, positions_BT) if self.exit.kind == "block" else None


def unit_norm(config: ModelConfig, hidden_BTD: jax.Array) -> jax.Array:
    """States [B, T, D] normalised as the model's norms do it, without scale and bias."""
    ones = jnp.ones((config.d_model,), jnp.float32)
    if config.norm == "rmsnorm":
        return rms_norm(hidden_BTD, ones, config.norm_eps, config.norm_width)
    return layer_norm(hidden_BTD, ones, jnp.zeros_like(ones), config.norm_eps, config.norm_width)


class Gate(nn.Module):
    """sigmoid(w2 silu(W1 x + b1) + b2): how likely the exit is right, without reading its vocabulary head."""

    config: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = self.config.param_dtype
        h = jax.nn.silu(Linear((self.width,), (None, "embed"), True, dtype, name="up")(x_BTD))
        score = Linear((1,), (None, None), True, dtype, name="down")(h)
        return jax.nn.sigmoid(score[..., 0].astype(jnp.float32))

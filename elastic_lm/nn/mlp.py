"""The feed-forward network, gated (SwiGLU and friends, Shazeer 2020) or plain."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.nn.linear import Linear


class MLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) without a gate.

    `up` holds gate and up in one kernel [2, F, D], so that one large product reads x once; without a
    gate it is [F, D].
    """

    config: ModelConfig | EncoderConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, gate_BTF: jax.Array | None = None) -> jax.Array:
        """Runs the network.

        Args:
          x_BTD: normalised input.
          gate_BTF: factors of the neurons (`width.gated`), or None.

        Returns:
          [B, T, D].
        """
        c = self.config
        act = ACTIVATIONS[c.activation]
        shape, axes = ((2, c.d_mlp), (None, "mlp", "embed")) if c.gated else ((c.d_mlp,), ("mlp", "embed"))
        h = Linear(shape, axes, c.mlp_bias, c.param_dtype, name="up")(x_BTD)
        h = act(h[..., 0, :]) * h[..., 1, :] if c.gated else act(h)
        h = h if gate_BTF is None else h * gate_BTF
        return Linear((c.d_model,), ("embed", "mlp"), c.mlp_bias, c.param_dtype, name="down")(h)


def relu2(x: jax.Array) -> jax.Array:
    """relu(x)^2 (Primer, So et al. 2021)."""
    return jnp.square(jax.nn.relu(x))


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU with the tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


def gelu(x: jax.Array) -> jax.Array:
    """GELU with the exact normal distribution function."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": relu2,
}

"""Routers: networks that choose the widths of a layer from a budget and, if wanted, from the layer's input.

    code(b)_a     piecewise linear in b: 1 at anchor a, 0 at all other anchors
    r             W_2 leaky_relu(W_1 [code(b); x / |x|]), logits of the choices; without x for static routers
    y             one_hot(argmax_i (s r_i + g_i)),  g_i Gumbel noise; its gradient is that of the softmax
                  of (s r + g) / tau (straight-through Gumbel-softmax)

What the choices y do to a layer is in `width.gated` for training and in `width.nested` for decoding. Routers
have no biases, and their weights begin as N(0, 0.1).

Papers: Flextron, arXiv 2406.10260; Nemotron Elastic, arXiv 2511.16664 (the form of the routers).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.subnet import Menu
from elastic_lm.models.decoder import Params
from elastic_lm.nn.linear import Linear

SLOPE = 0.1  # of leaky_relu below 0
DEVIATION = 0.1  # of new weights
ROUTER_WIDTH = 256  # of hidden layers, where nothing else is asked for


class Router(nn.Module):
    """A network of two layers from a code of the budget, or this and a state, to logits of several choices.

    Attributes:
      width: of the hidden layer.
      choices: (name, number of choices) of everything that is chosen.
    """

    width: int
    choices: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self, code: jax.Array) -> dict[str, jax.Array]:
        """Logits of everything that is chosen.

        Args:
          code: [..., A] float32 of `budget_code`, or [..., A + D] of `router_input`.

        Returns:
          {name: [..., choices] float32}.
        """
        x = nn.leaky_relu(Linear((self.width,), (None, None), name="hidden")(code), SLOPE)
        return {name: Linear((n,), (None, None), name=name)(x) for name, n in self.choices}


def layer_router(menu: Menu, width: int) -> Router:
    """The router of one layer, which chooses its heads and its neurons.

    Args:
      menu: what may be chosen.
      width: of the hidden layer.
    """
    return Router(width, (("heads", len(menu.heads)), ("mlp", len(menu.mlp))), parent=None)


def init_router(router: nn.Module, inputs: int, key: jax.Array) -> Params:
    """New parameters N(0, 0.1) of a router, or of any other module without biases.

    Args:
      router: the module; static.
      inputs: width of its input; static.
      key: typed PRNG key.
    """
    shapes = jax.eval_shape(router.init, key, jnp.zeros((1, inputs)))["params"]
    leaves, tree = jax.tree.flatten(nn.unbox(shapes))
    keys = jax.random.split(key, len(leaves))
    drawn = [DEVIATION * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def budget_code(budget: jax.Array, anchors: tuple[float, ...]) -> jax.Array:
    """[..., A] float32: weights of the anchors whose weighted mean is the budget.

    Args:
      budget: [...] float32 share of the whole model's cost, clipped to the range of the anchors; traced.
      anchors: increasing; static.
    """
    points = jnp.asarray(anchors, jnp.float32)
    budget = jnp.clip(budget, points[0], points[-1])[..., None]
    eye = np.eye(len(anchors), dtype=np.float32)
    if len(anchors) == 1:
        return jnp.broadcast_to(eye[0], budget.shape)

    # The two anchors around the budget share the weight, the nearer one has more of it.
    above = jnp.clip(jnp.sum(budget[..., 0, None] >= points, axis=-1), 1, len(anchors) - 1)
    low, high = points[above - 1], points[above]
    share = ((budget[..., 0] - low) / (high - low))[..., None]
    return (1 - share) * jnp.asarray(eye)[above - 1] + share * jnp.asarray(eye)[above]


def router_input(code: jax.Array, state: jax.Array) -> jax.Array:
    """[..., A + D] float32: the code of a budget concatenated with the state, scaled to length 1.

    Without scaling, a state of hundreds of channels would dominate the code.

    Args:
      code: [..., A], broadcast against the state.
      state: [..., D].
    """
    state = state.astype(jnp.float32)
    state = state * jax.lax.rsqrt(jnp.sum(jnp.square(state), axis=-1, keepdims=True) + 1e-6)
    return jnp.concatenate([jnp.broadcast_to(code, (*state.shape[:-1], code.shape[-1])), state], axis=-1)


def straight_through(
    logits: jax.Array, key: jax.Array | None = None, scale: jax.Array | float = 1.0, tau: Any = 1.0
) -> jax.Array:
    """One-hot choices whose gradient is that of a softmax (straight-through Gumbel-softmax).

    Args:
      logits: [..., C] float32.
      key: typed PRNG key of the Gumbel noise; None = the likeliest choice, without noise.
      scale: s, multiplies the logits; traced.
      tau: temperature of the softmax; traced.

    Returns:
      [..., C] float32.
    """
    scores = scale * logits
    if key is not None:
        scores = scores + jax.random.gumbel(key, logits.shape)
    soft = jax.nn.softmax(scores / tau, axis=-1)
    hard = jax.nn.one_hot(jnp.argmax(scores, axis=-1), logits.shape[-1])
    return hard + (soft - jax.lax.stop_gradient(soft))

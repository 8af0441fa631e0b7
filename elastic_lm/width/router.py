"""Routers: the widths of a layer chosen from a budget and, if wanted, from what the layer is given.

    code(b)_a     piecewise linear in b: 1 at anchor a, 0 at all other anchors
    r             W_2 leaky_relu(W_1 [code(b); x / |x|]), logits of the choices; x only if it is read
    y             one_hot(argmax_i (s r_i + g_i)),  g_i Gumbel noise; its gradient is that of the softmax
                  of (s r + g) / tau (straight-through Gumbel-softmax)
    gated layer   the layer with neurons and heads multiplied by sum_i y_i prefix_i

prefix_i is 1 for what choice i keeps and 0 for the rest, so that a gated layer computes what its slice
computes, and is differentiable in y. Biases there are none; weights begin as N(0, 0.1).

Papers: Flextron, arXiv 2406.10260; Nemotron Elastic, arXiv 2511.16664 (the form of the routers).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.subnet import Menu
from elastic_lm.nn.linear import Linear
from elastic_lm.width.axes import Params

SLOPE = 0.1  # of leaky_relu below 0
DEVIATION = 0.1  # of new weights


class Router(nn.Module):
    """Two layers from a code of the budget, and possibly a state, to logits of several choices.

    Attributes:
      width: of the hidden layer.
      choices: (name, number of choices) of everything that is chosen.
    """

    width: int
    choices: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self, code: jax.Array) -> dict[str, jax.Array]:
        """{name: [..., choices] float32 logits}.

        Args:
          code: [..., A] float32 of `budget_code`, or [..., A + D] of `router_input`.
        """
        x = nn.leaky_relu(Linear((self.width,), (None, None), name="hidden")(code), SLOPE)
        return {name: Linear((n,), (None, None), name=name)(x) for name, n in self.choices}


def layer_router(menu: Menu, width: int) -> Router:
    """The router of one layer: of its heads and of its neurons.

    Args:
      menu: what may be chosen.
      width: of the hidden layer.
    """
    return Router(width, (("heads", len(menu.heads)), ("mlp", len(menu.mlp))), parent=None)


def init_router(router: nn.Module, inputs: int, key: jax.Array) -> Params:
    """New parameters of a router, or of anything else without biases.

    Args:
      router: static.
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
      budget: [...] float32, as a share of the whole model's cost; traced. Below the first anchor it is
        taken for it, above the last one too.
      anchors: increasing; static.
    """
    points = jnp.asarray(anchors, jnp.float32)
    budget = jnp.clip(budget, points[0], points[-1])[..., None]
    eye = np.eye(len(anchors), dtype=np.float32)
    if len(anchors) == 1:
        return jnp.broadcast_to(eye[0], budget.shape)
    above = jnp.clip(jnp.sum(budget[..., 0, None] >= points, axis=-1), 1, len(anchors) - 1)
    low, high = points[above - 1], points[above]
    share = ((budget[..., 0] - low) / (high - low))[..., None]
    return (1 - share) * jnp.asarray(eye)[above - 1] + share * jnp.asarray(eye)[above]


def router_input(code: jax.Array, state: jax.Array) -> jax.Array:
    """[..., A + D] float32: a code beside a state of the same length, 1, lest the state drown it.

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
      key: typed PRNG key of the noise; None = the likeliest choice, without noise.
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

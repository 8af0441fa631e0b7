"""A surrogate of the loss: routers learn through it, without a backward pass through the model.

With e = CE(z_x) - CE(z) of the row, x being the sub-network that was picked, and S a small network that reads
what was picked:

    minimise over S         (S(x) - e)^2
    minimise over routers   S(x) + a miss(x, b), in steps where S is trusted:
                            mean |S(x) - e| < `surrogate_error`

Flextron's surrogate (arXiv 2406.10260, sec. 3) predicts the loss from the routers' logits. Ours predicts from
the choice that was run how much the row's loss rises over that of the whole model, so that neither the noise
of the choice nor how hard a text is has to be learned. S is forgotten after training.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Params
from elastic_lm.nn.linear import Linear
from elastic_lm.train.losses import Metrics
from elastic_lm.width.picking import Picking, row_mean
from elastic_lm.width.router import SLOPE, init_router
from elastic_lm.width.trained_routers import RouterShape

SURROGATE = "surrogate"  # key of its parameters


class Surrogate(nn.Module):
    """S: from one-hot choices to the rise of the loss, in nats per token."""

    width: int

    @nn.compact
    def __call__(self, picked_BI: jax.Array) -> jax.Array:
        """[B] rise of every row's loss."""
        x = nn.leaky_relu(Linear((self.width,), (None, None), name="hidden")(picked_BI), SLOPE)
        return Linear((1,), (None, None), name="rise")(x)[..., 0]


def init_surrogate(shape: RouterShape, key: jax.Array) -> Params:
    """New parameters of the surrogate for routers of this shape.

    Args:
      shape: of the routers.
      key: typed PRNG key.
    """
    menu = shape.menu
    inputs = shape.config.n_layers * (len(menu.heads) + len(menu.mlp)) + len(menu.dropped) + 1
    return init_router(Surrogate(shape.width), inputs, key)


def rise(picking: Picking, params: Params, batch: Batch, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """([B] e, scalar CE of what was picked), without gradient.

    Args:
      picking: whose routers picked.
      params: model, stacked.
      batch: packed tokens, targets and weights.
      hidden: [B, T, D] state after the last layer of what was picked.
    """
    hidden, params = jax.lax.stop_gradient((hidden, params))
    picked = picking.token_sums(params, batch, hidden)
    whole = picking.token_sums(params, batch, picking.whole(params, batch))
    entropy = jnp.sum(picked.loss) / jnp.maximum(jnp.sum(picked.weight), 1.0)
    return (picked.loss - whole.loss) / jnp.maximum(picked.weight, 1.0), entropy


def surrogate_loss(
    network: Surrogate,
    params: Params,
    batch: Batch,
    picked: dict[str, jax.Array],
    rise_B: jax.Array,
    *,
    miss: jax.Array,
    most_error: float,
) -> tuple[jax.Array, Metrics]:
    """(S(x) - e)^2 for the surrogate and, where S is trusted, S(x) + a miss(x, b) for the routers.

    Args:
      network: S.
      params: of S.
      batch: packed tokens.
      picked: second result of `Picking.forward`.
      rise_B: e of every row.
      miss: scalar a miss(x, b).
      most_error: mean error below which S is trusted.

    Returns:
      (scalar, metrics `surrogate/error` and `surrogate/trusted`).
    """
    flat = [jnp.moveaxis(picked[name], 1, 0).reshape(rise_B.shape[0], -1) for name in ("heads", "mlp")]
    picked_BI = jnp.concatenate([*flat, picked["dropped"]], axis=-1)

    # S learns from the picks without moving them, and the routers learn through S without moving it.
    held = jax.lax.stop_gradient
    predicted_B: Any = network.apply({"params": params}, held(picked_BI))
    through_B: Any = network.apply({"params": held(params)}, picked_BI)

    error = row_mean(jnp.abs(held(predicted_B) - rise_B), batch)
    trusted = error < most_error
    routers = jnp.where(trusted, row_mean(through_B, batch) + miss, 0.0)
    loss = row_mean(jnp.square(predicted_B - rise_B), batch) + routers
    return loss, {"surrogate/error": error, "surrogate/trusted": trusted.astype(jnp.float32)}

"""Forward passes in which every layer takes the widths that a router picks, over stacked parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.config import ModelConfig
from elastic_lm.elastic import Menu
from elastic_lm.models.decoder import Decoder, Params, default_positions
from elastic_lm.nn.router import Picks, gated_block


def routed_hidden(
    config: ModelConfig,
    menu: Menu,
    params: Params,
    tokens_BT: jax.Array,
    pick: Callable[[Any, jax.Array], Picks],
    given: Any,
    keep_LB: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    remat: bool = False,
) -> tuple[jax.Array, Picks]:
    """State after the last layer, every layer gated by what is picked; differentiable in the picks.

    Args:
      config: the whole model, all layers of one size; static.
      menu: what may be chosen; static. Groups and channels stay whole.
      params: stacked parameters.
      tokens_BT: int32 token ids.
      pick: from a layer's part of `given` and its input [B, T, D] to its picks, [B, T or 1, choices] each.
      given: tree of arrays with a leading layer dimension.
      keep_LB: float32, 1 where a row runs a layer and 0 where the row leaves it out.
      positions_BT: int32 positions; None = 0 .. T-1.
      segments_BT: int32 document ids of a packed batch, 0 = padding; None = one document per row.
      remat: recompute each layer in the backward pass; static.

    Returns:
      ([B, T, D], picks of all layers as means over the row's tokens, [L, B, choices] each).
    """
    positions_BT = default_positions(tokens_BT, positions_BT)
    sizes = menu.sizes(config)
    hidden = Decoder(config).bind({"params": params}).embed(tokens_BT, positions_BT)
    counted_BT = jnp.ones(tokens_BT.shape) if segments_BT is None else (segments_BT > 0).astype(jnp.float32)
    share_BT1 = (counted_BT / jnp.maximum(jnp.sum(counted_BT, axis=1, keepdims=True), 1.0))[..., None]

    def layer(hidden: jax.Array, xs: Any) -> tuple[jax.Array, Picks]:
        params, given, keep_B, window = xs
        picks = pick(given, hidden)
        tap = gated_block(
            config.layer(0), sizes.heads[0], sizes.mlp[0], params, hidden, positions_BT, picks,
            window=window if config.windows else 0, segments_BT=segments_BT,
        )  # fmt: skip
        mean = jax.tree.map(lambda p: jnp.sum(p * share_BT1, axis=1) if p.shape[1] > 1 else p[:, 0], picks)
        keep = keep_B[:, None, None].astype(hidden.dtype)
        return hidden + keep * (tap.hidden - hidden), mean

    windows = jnp.asarray([config.window(i) for i in range(config.n_layers)], jnp.int32)
    body = jax.checkpoint(layer) if remat else layer
    return jax.lax.scan(body, hidden, (params["layers"], given, keep_LB, windows))

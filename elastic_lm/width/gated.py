"""Forward passes in which every layer takes the widths that a router picks, over stacked parameters."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Ints, Menu
from elastic_lm.models.decoder import Decoder, Params, default_positions
from elastic_lm.nn.attention import Attention
from elastic_lm.nn.block import Block, Tap
from elastic_lm.nn.mlp import MLP
from elastic_lm.width.axes import grouped_lives


@flax.struct.dataclass
class Picks:
    """What one layer takes, as weights of its choices that are one-hot (`straight_through`).

    Attributes:
      heads: [..., choices of query heads per key/value group] float32.
      mlp: [..., choices of MLP neurons] float32.
    """

    heads: jax.Array
    mlp: jax.Array


def gated_hidden(
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


def prefixes(config: ModelConfig, heads: Ints, mlp: Ints) -> tuple[np.ndarray, np.ndarray]:
    """What each choice keeps.

    Args:
      config: homogeneous config of the layer.
      heads: choices of query heads in every key/value group.
      mlp: choices of neurons.

    Returns:
      ([choices, N] float32 over query heads, [choices, F] float32 over neurons), 1 where it is kept.
    """
    head = np.arange(config.n_heads) % config.group_size
    kept = [head < n for n in heads]
    neurons = [grouped_lives(config.d_mlp, n, config.elastic_groups) for n in mlp]
    return np.asarray(kept, np.float32), np.asarray(neurons, np.float32)


def gated_block(
    config: ModelConfig,
    heads: Ints,
    mlp: Ints,
    params: Params,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    picks: Picks,
    *,
    window: int | jax.Array = 0,
    segments_BT: jax.Array | None = None,
) -> Tap:
    """`nn.block.Block` with neurons and heads gated by what is picked; computes everything.

    Args:
      config: homogeneous config of the layer; static.
      heads: choices of query heads in every key/value group; static.
      mlp: choices of neurons; static.
      params: the layer's parameters.
      x_BTD: input of the layer.
      positions_BT: int32 positions of the tokens.
      picks: [B, T or 1, choices] each; traced.
      window: see `nn.attention.attend`.
      segments_BT: document ids, or None.
    """
    keep_HN, keep_FN = prefixes(config, heads, mlp)
    gate_BTN = (picks.heads @ keep_HN).astype(x_BTD.dtype)
    gate_BTF = (picks.mlp @ keep_FN).astype(x_BTD.dtype)

    def attention(x_BTD: jax.Array) -> Any:
        return Attention(config, parent=None).apply(
            {"params": params["attn"]}, x_BTD, positions_BT,
            window=window, segments_BT=segments_BT, gate_BTN=gate_BTN,
        )  # fmt: skip

    def feed_forward(x_BTD: jax.Array) -> Any:
        return MLP(config, parent=None).apply({"params": params["mlp"]}, x_BTD, gate_BTF)

    block = Block(config, parent=None)
    found: Any = block.apply({"params": params}, x_BTD, attention, feed_forward, method="around")
    return found[0]

"""Forward passes in which every layer takes the widths that a router picks: routers train with these.

    gated layer   the layer with neurons and heads multiplied by sum_i y_i prefix_i

y are the weights of the choices, one-hot (`width.router.straight_through`); prefix_i is 1 for what choice i
keeps and 0 for the rest. A gated layer gives what its slice gives, and is differentiable in y. It computes
the whole layer, so that nothing is saved: decoding uses `width.nested`.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Ints, Menu
from elastic_lm.models.decoder import Decoder, Params, default_positions
from elastic_lm.nn.attention import Attention, AttentionContext
from elastic_lm.nn.block import Block, Tap
from elastic_lm.nn.mlp import MLP
from elastic_lm.nn.remat import Remat, recomputed
from elastic_lm.nn.rope import scanned_rotations
from elastic_lm.width.axes import grouped_kept


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
    remat: Remat = False,
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
      remat: what the backward pass computes again (`nn.remat`); static.

    Returns:
      ([B, T, D], picks of all layers as means over the row's tokens, [L, B, choices] each).
    """
    positions_BT = default_positions(tokens_BT, positions_BT)
    sizes = menu.sizes(config)
    hidden = Decoder(config).bind({"params": params}).embed(tokens_BT, positions_BT)

    # The share that every token has in the mean of its row; padding has none.
    counted_BT = jnp.ones(tokens_BT.shape) if segments_BT is None else (segments_BT > 0).astype(jnp.float32)
    share_BT1 = (counted_BT / jnp.maximum(jnp.sum(counted_BT, axis=1, keepdims=True), 1.0))[..., None]

    kinds, rotation_of = scanned_rotations(config, positions_BT)

    def layer(hidden: jax.Array, xs: Any) -> tuple[jax.Array, Picks]:
        params, given, keep_B, window, kind = xs
        picks = pick(given, hidden)
        window = window if config.windows else 0
        context = AttentionContext(positions_BT, segments_BT, window, rotation=rotation_of(kind))
        tap = gated_block(config, params, hidden, context, picks, heads=sizes.heads[0], mlp=sizes.mlp[0])
        mean = jax.tree.map(lambda p: jnp.sum(p * share_BT1, axis=1) if p.shape[1] > 1 else p[:, 0], picks)

        # A product, unlike a `where`, passes a gradient on to `keep_LB`, which routers learn too.
        keep = keep_B[:, None, None].astype(hidden.dtype)
        return hidden + keep * (tap.hidden - hidden), mean

    windows = jnp.asarray([config.window(i) for i in range(config.n_layers)], jnp.int32)
    body = recomputed(layer, remat)
    return jax.lax.scan(body, hidden, (params["layers"], given, keep_LB, windows, kinds))


def gated_block(
    config: ModelConfig,
    params: Params,
    x_BTD: jax.Array,
    context: AttentionContext,
    picks: Picks,
    *,
    heads: Ints,
    mlp: Ints,
) -> Tap:
    """`nn.block.Block` with neurons and heads gated by what is picked; computes everything.

    Args:
      config: homogeneous config of the layer; static.
      params: the layer's parameters.
      x_BTD: input of the layer.
      context: positions of the tokens, and what they see.
      picks: [B, T or 1, choices] each; traced.
      heads: choices of query heads in every key/value group; static.
      mlp: choices of neurons; static.
    """
    keep_HN, keep_FN = prefixes(config, heads, mlp)
    gate_BTN = (picks.heads @ keep_HN).astype(x_BTD.dtype)
    gate_BTF = (picks.mlp @ keep_FN).astype(x_BTD.dtype)

    def attention(x_BTD: jax.Array) -> Any:
        own = {"params": params["attn"]}
        return Attention(config, parent=None).apply(own, x_BTD, context, gate_BTN=gate_BTN)

    def feed_forward(x_BTD: jax.Array) -> Any:
        return MLP(config, parent=None).apply({"params": params["mlp"]}, x_BTD, gate_BTF)

    block = Block(config, parent=None)
    result: Any = block.apply({"params": params}, x_BTD, attention, feed_forward, method="around")
    return result[0]


def prefixes(config: ModelConfig, heads: Ints, mlp: Ints) -> tuple[np.ndarray, np.ndarray]:
    """What each choice keeps.

    Args:
      config: homogeneous config of the layer.
      heads: choices of query heads in every key/value group.
      mlp: choices of neurons.

    Returns:
      ([choices, N] float32 over query heads, [choices, F] float32 over neurons), 1 for what is kept.
    """
    head = np.arange(config.n_heads) % config.group_size
    kept = [head < n for n in heads]
    neurons = [grouped_kept(config.d_mlp, n, config.elastic_groups) for n in mlp]
    return np.asarray(kept, np.float32), np.asarray(neurons, np.float32)

"""Forward passes of a sub-network chosen while the program runs, over canonical or stacked parameters."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config import ModelConfig
from elastic_lm.elastic import Menu, Subnet
from elastic_lm.models.decoder import Decoder, Params, default_positions
from elastic_lm.nn.block import Tap
from elastic_lm.nn.elastic import elastic_block


@flax.struct.dataclass
class Choice:
    """A subnet as indices into a menu; traced.

    Attributes:
      mlp: [L] int32, index into the MLP choices of every layer.
      heads: [L] int32, index into the head choices of every layer.
      keep: [L] bool, False where a layer is left out.
      groups: [L] int32, index into the choices of key/value groups of every layer; None = all groups.
    """

    mlp: jax.Array
    heads: jax.Array
    keep: jax.Array
    groups: jax.Array | None = None

    @classmethod
    def of(cls, config: ModelConfig, menu: Menu, subnet: Subnet) -> "Choice":
        """The choice that computes a subnet; raises as `Menu.indices` does."""
        mlp, heads, groups, keep = menu.indices(config, subnet)
        mlp, heads, groups = (jnp.asarray(indices, jnp.int32) for indices in (mlp, heads, groups))
        return cls(mlp, heads, jnp.asarray(keep), groups)


def elastic_taps(
    config: ModelConfig,
    menu: Menu,
    params: Params,
    tokens_BT: jax.Array,
    choice: Choice,
    depths: Sequence[int] | None = None,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    remat: bool = False,
) -> dict[int, Tap]:
    """`Decoder.taps` of the sub-network that `choice` names; layers left out are not computed.

    Args:
      config: the whole model; static.
      menu: what may be chosen; static. Channels are not switched.
      params: canonical or stacked parameters.
      tokens_BT: int32 token ids.
      choice: what is chosen; traced, so one program serves all sub-networks.
      depths: layer counts of the whole model (1 .. n_layers), static; None = the full depth.
      positions_BT: int32 positions; None = 0 .. T-1.
      segments_BT: int32 document ids of a packed batch; None = one document per row.
      remat: recompute each layer in the backward pass; static.

    Returns:
      {depth: Tap}. The tap of a layer that is left out has the layer's input in every field.
    """
    positions_BT = default_positions(tokens_BT, positions_BT)
    sizes = menu.sizes(config)
    hidden = Decoder(config).bind({"params": params}).embed(tokens_BT, positions_BT)

    def layer(i: int, params: Params, hidden: jax.Array, chosen: Choice, window: int | jax.Array) -> Tap:
        groups = jnp.int32(len(sizes.groups[i]) - 1) if chosen.groups is None else chosen.groups

        def run(hidden: jax.Array) -> Tap:
            return elastic_block(
                config.layer(i),
                sizes.mlp[i],
                sizes.heads[i],
                sizes.groups[i],
                params,
                hidden,
                positions_BT,
                chosen.mlp,
                chosen.heads,
                groups,
                window=window,
                segments_BT=segments_BT,
            )[0]

        return jax.lax.cond(chosen.keep, run, lambda hidden: Tap(*[hidden] * 4), hidden)

    layer = jax.checkpoint(layer, static_argnums=(0,)) if remat else layer
    taps: dict[int, Tap] = {}
    start = 0
    for depth in sorted(set(depths or (config.n_layers,))):
        if "layers" in params:
            hidden = _scan(config, params["layers"], hidden, choice, layer, start, depth - 1)
            start = depth - 1
        for i in range(start, depth):
            chosen = jax.tree.map(lambda x, i=i: x[i], choice)
            own = jax.tree.map(lambda p, i=i: p[i], params["layers"]) if "layers" in params else None
            own = params[f"layers_{i}"] if own is None else own
            taps[depth] = layer(i, own, hidden, chosen, config.window(i))
            hidden = taps[depth].hidden
        start = depth
    return taps


def _scan(config, stacked, hidden, choice, layer, start: int, stop: int) -> jax.Array:
    """State after stacked layers start .. stop-1."""
    windows = jnp.asarray([config.window(i) for i in range(start, stop)], jnp.int32)

    def step(hidden, xs):
        params, chosen, window = xs
        return layer(0, params, hidden, chosen, window if config.windows else 0).hidden, None

    part = jax.tree.map(lambda x: x[start:stop], (stacked, choice))
    return jax.lax.scan(step, hidden, (*part, windows))[0] if stop > start else hidden

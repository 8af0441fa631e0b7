"""A layer whose width is chosen while the program runs: one compiled program for all sub-networks.

    y = switch(i, [W_down[:, :f] act(W_up[:f] x)  for f in MLP choices])
    y = switch(j, [attention of the first a heads of the first k groups  for a in heads, k in groups])

Every branch slices the shared parameters statically, so what runs costs what the choice costs. The backward
pass computes the branch again: a conditional would keep what any of its branches needs for it, under every
choice. On one CPU core (4 layers, d 256, MLP 1024) that takes 56 MB instead of 193, and 0.19 s instead of
0.30 for the gradient of a quarter's width.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.models.decoder import Decoder, default_positions
from elastic_lm.nn.attention import Attention, KeyValues, NewKeyValues
from elastic_lm.nn.block import Block, Tap
from elastic_lm.nn.mlp import MLP
from elastic_lm.width.axes import Params, edit_params, slice_edit


def elastic_block(
    config: ModelConfig,
    mlp: tuple[int, ...],
    heads: tuple[int, ...],
    groups: tuple[int, ...],
    params: Params,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    mlp_index: jax.Array,
    heads_index: jax.Array,
    groups_index: jax.Array,
    *,
    window: int | jax.Array = 0,
    segments_BT: jax.Array | None = None,
    past: KeyValues | None = None,
) -> tuple[Tap, NewKeyValues]:
    """`nn.block.Block` with MLP width, heads and key/value groups of a traced choice.

    New rows have the whole layer's shape under every choice, so caches keep theirs. Those of a group that is
    left out are zeros, which no token should attend to: a sequence that is decoded keeps its groups.

    Args:
      config: homogeneous config of the layer (`ModelConfig.layer`); static.
      mlp: choices of MLP neurons; static.
      heads: choices of query heads in every key/value group; static.
      groups: choices of key/value groups; static.
      params: the layer's parameters.
      x_BTD: input of the layer.
      positions_BT: int32 positions of the tokens.
      mlp_index: int32 scalar, index into `mlp`; traced.
      heads_index: int32 scalar, index into `heads`; traced.
      groups_index: int32 scalar, index into `groups`; traced.
      window: see `nn.attention.attend`.
      segments_BT: document ids, or None.
      past: cached keys and values, or None.

    Returns:
      (Tap, new keys and values), as `Block` does.
    """
    attend = functools.partial(
        _attention, config, positions_BT=positions_BT, window=window, segments_BT=segments_BT, past=past
    )
    attentions = [jax.checkpoint(functools.partial(attend, a, k)) for a in heads for k in groups]
    attention_index = heads_index * len(groups) + groups_index
    mlps = [jax.checkpoint(functools.partial(_mlp, config, f)) for f in mlp]

    def attention(x_BTD: jax.Array) -> tuple[jax.Array, NewKeyValues]:
        return jax.lax.switch(attention_index, attentions, params["attn"], x_BTD)

    def feed_forward(x_BTD: jax.Array) -> jax.Array:
        return jax.lax.switch(mlp_index, mlps, params["mlp"], x_BTD)

    block = Block(config, parent=None)
    result: Any = block.apply({"params": params}, x_BTD, attention, feed_forward, method="around")
    return result


def _attention(
    config: ModelConfig,
    heads: int,
    groups: int,
    params: Params,
    x_BTD: jax.Array,
    *,
    past: KeyValues | None,
    **kwargs: Any,
) -> tuple[jax.Array, NewKeyValues]:
    """Attention of the first `heads` query heads of each of the first `groups` groups."""
    small = dataclasses.replace(config, n_heads=heads * groups, n_kv_heads=groups)
    edit = slice_edit(config, config.d_mlp, heads, groups, config.d_model)
    sliced = edit_params(params, edit, ("attn",))
    if past is not None:
        past = dataclasses.replace(past, k=past.k[:, :groups], v=past.v[:, :groups])
    result: Any = Attention(small, parent=None).apply({"params": sliced}, x_BTD, past=past, **kwargs)
    out, (k, v) = result
    left_out = ((0, 0), (0, config.n_kv_heads - groups), (0, 0), (0, 0))
    return out, (jnp.pad(k, left_out), jnp.pad(v, left_out))


def _mlp(config: ModelConfig, neurons: int, params: Params, x_BTD: jax.Array) -> Any:
    """MLP of the `neurons` most important neurons."""
    small = dataclasses.replace(config, d_mlp=neurons)
    edit = slice_edit(config, neurons, config.group_size, config.n_kv_heads, config.d_model)
    return MLP(small, parent=None).apply({"params": edit_params(params, edit, ("mlp",))}, x_BTD)


@flax.struct.dataclass
class MenuIndices:
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
    def of(cls, config: ModelConfig, menu: Menu, subnet: Subnet) -> "MenuIndices":
        """The choice that computes a subnet; raises as `Menu.indices` does."""
        mlp, heads, groups, keep = menu.indices(config, subnet)
        mlp, heads, groups = (jnp.asarray(indices, jnp.int32) for indices in (mlp, heads, groups))
        return cls(mlp, heads, jnp.asarray(keep), groups)


def elastic_taps(
    config: ModelConfig,
    menu: Menu,
    params: Params,
    tokens_BT: jax.Array,
    choice: MenuIndices,
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

    def layer(i: int, params: Params, hidden: jax.Array, chosen: MenuIndices, window: int | jax.Array) -> Tap:
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

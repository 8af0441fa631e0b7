"""A layer whose width is chosen while the program runs: one compiled program for all sub-networks.

    y = switch(i, [W_down[:, :f] act(W_up[:f] x)  for f in MLP choices])
    y = switch(j, [attention of the first a heads of the first k groups  for a in heads, k in groups])

Every branch slices the shared parameters statically, so a choice costs what its slice costs. This is the form
to train with; `width.slicing` has the others, and `width.nested` says why decoding does not switch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Ints, Menu, Subnet
from elastic_lm.models.decoder import Decoder, Params, default_positions
from elastic_lm.nn.attention import Attention, AttentionContext, NewKeyValues
from elastic_lm.nn.block import Block, Tap
from elastic_lm.nn.mlp import MLP
from elastic_lm.nn.remat import Remat, recomputed
from elastic_lm.nn.rope import scanned_rotations
from elastic_lm.width.axes import edit_params, slice_edit


@flax.struct.dataclass
class MenuIndices:
    """A subnet as indices into a menu; traced.

    Attributes:
      mlp: [L] int32, index into the MLP choices of every layer.
      heads: [L] int32, index into the head choices of every layer.
      keep: [L] bool, False for layers that are left out.
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
    remat: Remat = False,
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
      remat: what the backward pass computes again (`nn.remat`); static.

    Returns:
      {depth: Tap}. The tap of a layer that is left out has the layer's input in every field.
    """
    positions_BT = default_positions(tokens_BT, positions_BT)
    sizes = menu.sizes(config)
    hidden = Decoder(config).bind({"params": params}).embed(tokens_BT, positions_BT)

    kinds, rotation_of = scanned_rotations(config, positions_BT)

    def layer(
        i: int | None,
        params: Params,
        hidden: jax.Array,
        chosen: MenuIndices,
        window: int | jax.Array,
        kind: jax.Array,
    ) -> Tap:
        """Layer i (static), of which `chosen` has the indices; None = any of layers of one size."""
        own = config if i is None else config.layer(i)
        rotation = rotation_of(kind) if own.rotates else None
        context = AttentionContext(positions_BT, segments_BT, window, rotation=rotation)

        def run(hidden: jax.Array) -> Tap:
            tap, _ = elastic_block(
                own,
                params,
                hidden,
                context,
                chosen,
                mlp=sizes.mlp[i or 0],
                heads=sizes.heads[i or 0],
                kv_groups=sizes.groups[i or 0],
            )
            return tap

        return jax.lax.cond(chosen.keep, run, lambda hidden: Tap(*[hidden] * 4), hidden)

    layer = recomputed(layer, remat, static_argnums=(0,))
    stacked = params.get("layers")
    taps: dict[int, Tap] = {}
    start = 0
    for depth in sorted(set(depths or (config.n_layers,))):
        # As in `Decoder`, a scan carries states alone, so the layer with the tap stands apart.
        if stacked is not None:
            hidden = _scan_layers(config, stacked, hidden, choice, layer, kinds, start, depth - 1)
            start = depth - 1
        for i in range(start, depth):
            chosen = jax.tree.map(lambda x, i=i: x[i], choice)
            own = params[f"layers_{i}"] if stacked is None else jax.tree.map(lambda p, i=i: p[i], stacked)
            taps[depth] = layer(i, own, hidden, chosen, config.window(i), kinds[i])
            hidden = taps[depth].hidden
        start = depth
    return taps


def _scan_layers(
    config: ModelConfig,
    stacked: Params,
    hidden: jax.Array,
    choice: MenuIndices,
    layer: Callable[..., Tap],
    kinds: np.ndarray,
    start: int,
    stop: int,
) -> jax.Array:
    """State after stacked layers start .. stop-1."""
    windows = jnp.asarray([config.window(i) for i in range(start, stop)], jnp.int32)

    def step(hidden: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        params, chosen, window, kind = xs
        return layer(None, params, hidden, chosen, window if config.windows else 0, kind).hidden, None

    part = jax.tree.map(lambda x: x[start:stop], (stacked, choice))
    return jax.lax.scan(step, hidden, (*part, windows, kinds[start:stop]))[0] if stop > start else hidden


def elastic_block(
    config: ModelConfig,
    params: Params,
    x_BTD: jax.Array,
    context: AttentionContext,
    chosen: MenuIndices,
    *,
    mlp: Ints,
    heads: Ints,
    kv_groups: Ints,
) -> tuple[Tap, NewKeyValues]:
    """`nn.block.Block` whose MLP width, heads and key/value groups are traced choices.

    New keys and values have the whole layer's shape under every choice, so caches keep theirs. Those of a
    group that is left out are zeros, which no token should attend to: a sequence that is decoded keeps its
    groups.

    Args:
      config: homogeneous config of the layer (`ModelConfig.layer`); static.
      params: the layer's parameters.
      x_BTD: input of the layer.
      context: positions of the tokens, and what they see.
      chosen: indices into the choices of this layer, scalars; `keep` is not read.
      mlp: choices of MLP neurons; static.
      heads: choices of query heads in every key/value group; static.
      kv_groups: choices of key/value groups; static.

    Returns:
      (Tap, new keys and values), as `Block` does.
    """
    # The backward pass computes a branch again. A conditional would otherwise keep what the backward pass of
    # any branch needs, whichever was taken: 193 MB instead of 56, and 0.30 s instead of 0.19 for the gradient
    # of a quarter's width, on one CPU core (4 layers, d 256, MLP 1024).
    mlps = [jax.checkpoint(functools.partial(_sliced_mlp, config, f)) for f in mlp]
    attentions = [
        jax.checkpoint(functools.partial(_sliced_attention, config, a, k, context))
        for a in heads
        for k in kv_groups
    ]
    group_index = jnp.int32(len(kv_groups) - 1) if chosen.groups is None else chosen.groups
    attention_index = chosen.heads * len(kv_groups) + group_index

    def attention(x_BTD: jax.Array) -> tuple[jax.Array, NewKeyValues]:
        return jax.lax.switch(attention_index, attentions, params["attn"], x_BTD)

    def feed_forward(x_BTD: jax.Array) -> jax.Array:
        return jax.lax.switch(chosen.mlp, mlps, params["mlp"], x_BTD)

    block = Block(config, parent=None)
    result: Any = block.apply({"params": params}, x_BTD, attention, feed_forward, method="around")
    return result


def _sliced_attention(
    config: ModelConfig,
    heads: int,
    kv_groups: int,
    context: AttentionContext,
    params: Params,
    x_BTD: jax.Array,
) -> tuple[jax.Array, NewKeyValues]:
    """Attention of the first `heads` query heads of each of the first `kv_groups` groups."""
    edit = slice_edit(config, mlp=config.d_mlp, heads=heads, kv_groups=kv_groups, d_model=config.d_model)
    sliced = edit_params(params, edit, ("attn",))
    small = dataclasses.replace(config, n_heads=heads * kv_groups, n_kv_heads=kv_groups)
    if context.past is not None:
        past = context.past
        past = dataclasses.replace(past, k=past.k[:, :kv_groups], v=past.v[:, :kv_groups])
        context = dataclasses.replace(context, past=past)

    result: Any = Attention(small, parent=None).apply({"params": sliced}, x_BTD, context)
    out, (k, v) = result

    # All branches of a switch have results of one shape.
    left_out = ((0, 0), (0, config.n_kv_heads - kv_groups), (0, 0), (0, 0))
    return out, (jnp.pad(k, left_out), jnp.pad(v, left_out))


def _sliced_mlp(config: ModelConfig, neurons: int, params: Params, x_BTD: jax.Array) -> Any:
    """MLP of the `neurons` most important neurons."""
    edit = slice_edit(
        config,
        mlp=neurons,
        heads=config.group_size,
        kv_groups=config.n_kv_heads,
        d_model=config.d_model,
    )
    sliced = edit_params(params, edit, ("mlp",))
    return MLP(dataclasses.replace(config, d_mlp=neurons), parent=None).apply({"params": sliced}, x_BTD)

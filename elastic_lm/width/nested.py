"""A layer in nested blocks: a choice runs the blocks up to its own, and reads no other weights.

    MLP         y = sum_{b <= i} down_b act(up_b x)                      neurons between choices b - 1 and b
    attention   y = sum_{b <= i} out_b attend(queries_b x, K, V)         heads between choices b - 1 and b

Each block has arrays of its own and stands in a conditional that is taken if any token needs the block;
tokens that do not need it are masked. Decoding takes as long as reading weights does, so a batch pays for
the widest choice among its tokens in every layer. `ragged_dot` would save arithmetic too, but decoding does
not wait for that.

A `switch` over slices of whole arrays (`width.switched`) would not do for decoding, since XLA copies the
slice in every step of a loop: half of a layer's width took 1.2 times as long as all of it (d 768, MLP 2048,
one CPU core). Blocks read what they use: half widths run at 0.96 of their slice's speed and 1.4 times the
whole model's, all blocks at 0.83 of it (`bench widths`, 134 million parameters).

Block for block this computes what the switch and the slice compute, and all blocks together hold the layer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Ints
from elastic_lm.models.decoder import Params
from elastic_lm.nn.attention import (
    AttentionContext,
    KeyValues,
    NewKeyValues,
    alibi_of,
    attend,
    grown,
    norm_heads,
)
from elastic_lm.nn.block import Block, Tap
from elastic_lm.nn.linear import linear
from elastic_lm.nn.mlp import MLP
from elastic_lm.nn.norm import Norm
from elastic_lm.nn.rope import apply_rope
from elastic_lm.width.axes import Edit, edit_params, grouped_kept


def nested_block(
    config: ModelConfig,
    params: Params,
    x_BTD: jax.Array,
    context: AttentionContext,
    heads_BT: jax.Array,
    mlp_BT: jax.Array,
    *,
    mlp: Ints,
) -> tuple[Tap, NewKeyValues]:
    """`nn.block.Block` in which every token takes its own widths.

    Args:
      config: homogeneous config of the layer; static.
      params: from `nest`.
      x_BTD: input of the layer.
      context: positions of the tokens, and what they see; without documents.
      heads_BT: int32 index into the choices of heads, [B, T or 1]; traced.
      mlp_BT: int32 index into the choices of neurons, [B, T or 1]; traced.
      mlp: choices of neurons; static.

    Returns:
      (Tap, new keys and values), as `Block` does.
    """
    widths = np.diff((0, *mlp))

    def block(b: int, x_BTD: jax.Array) -> jax.Array:
        small = dataclasses.replace(config, d_mlp=int(widths[b]))
        y: Any = MLP(small, parent=None).apply({"params": params["mlp"][f"block_{b}"]}, x_BTD)
        return y

    def feed_forward(x_BTD: jax.Array) -> jax.Array:
        return _sum_of_blocks(len(mlp), mlp_BT, lambda b: block(b, x_BTD))

    def attention(x_BTD: jax.Array) -> tuple[jax.Array, NewKeyValues]:
        return _nested_attention(config, params["attn"], x_BTD, context, heads_BT)

    layer = Block(config, parent=None)
    result: Any = layer.apply({"params": params}, x_BTD, attention, feed_forward, method="around")
    return result


def _nested_attention(
    config: ModelConfig, params: Params, x_BTD: jax.Array, context: AttentionContext, heads_BT: jax.Array
) -> tuple[jax.Array, NewKeyValues]:
    """`nn.attention.Attention` in blocks of heads; keys and values are those of the whole layer."""
    c, (b, t) = config, x_BTD.shape[:2]

    def rotated(name: str, x_BTNH: jax.Array) -> jax.Array:
        """Queries or keys, normalised and rotated as the model does it."""
        if c.qk_norm:
            norm = Norm("rmsnorm", c.norm_eps, c.norm_offset, c.param_dtype, parent=None)
            own = {"params": params[name]}
            x_BTNH = norm_heads(c, lambda x: jnp.asarray(norm.apply(own, x)), x_BTNH)
        if not c.rotates:
            return x_BTNH
        return apply_rope(x_BTNH, context.rotation_of(c), c.rope.interleaved)

    kv = linear(x_BTD, params["kv"]["kernel"], params["kv"].get("bias"))
    k, v = rotated("k_norm", kv[:, :, :, 0]), kv[:, :, :, 1]
    new = KeyValues(jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), context.positions)

    # A model with penalties on distance has one block, since its heads are not chosen.
    alibi = alibi_of(c)

    def block(i: int) -> jax.Array:
        queries, out = params[f"queries_{i}"], params[f"out_{i}"]
        q = linear(x_BTD, queries["kernel"], queries.get("bias")).reshape(b, t, -1, c.head_dim)
        q = rotated("q_norm", q)
        q = grown(c, q, context.positions) if c.query_growth else q
        heads = attend(q, new, context, scale=c.query_scale, softcap=c.attn_softcap, alibi=alibi)
        return linear(heads.reshape(b, t, -1), out["kernel"], out.get("bias"))

    count = sum(name.startswith("out_") for name in params)
    return _sum_of_blocks(count, heads_BT, block), (new.k, new.v)


def _sum_of_blocks(count: int, index_BT: jax.Array, block: Callable[[int], jax.Array]) -> jax.Array:
    """[B, T, D]: for every token the sum of blocks 0 .. its index."""
    y_BTD = block(0)
    for b in range(1, count):
        takes_BT = index_BT >= b

        def more(y: jax.Array, b: int = b, takes_BT: jax.Array = takes_BT) -> jax.Array:
            return y + jnp.where(takes_BT[..., None], block(b), jnp.zeros((), y.dtype))

        y_BTD = jax.lax.cond(jnp.any(takes_BT), more, lambda y: y, y_BTD)
    return y_BTD


def nest(config: ModelConfig, heads: Ints, mlp: Ints, params: Params) -> Params:
    """The parameters of a layer as those of its nested blocks.

    Args:
      config: homogeneous config of the layer; static.
      heads: choices of query heads in every key/value group, increasing, the last one all; static.
      mlp: choices of neurons, increasing, the last one all; static.
      params: the layer's.

    Returns:
      Its norms as they are, {"kv", "queries_<b>", "out_<b>"} under `attn` and {"block_<b>"} under `mlp`.
      Biases of outputs are in block 0, and 0 in the others.
    """
    c, (qkv, out) = config, (params["attn"]["qkv"], params["attn"]["out"])

    # Attention: keys and values serve all blocks, norms of queries and keys stay.
    attn = {name: tree for name, tree in params["attn"].items() if name not in ("qkv", "out")}
    attn["kv"] = jax.tree.map(lambda leaf: leaf[:, c.group_size :], qkv)
    for b, (start, stop) in enumerate(zip((0, *heads), heads, strict=False)):
        head = np.arange(c.n_heads) % c.group_size
        columns = np.flatnonzero(np.repeat((head >= start) & (head < stop), c.head_dim))
        attn[f"queries_{b}"] = jax.tree.map(lambda leaf, s=start, e=stop: leaf[:, s:e], qkv)
        attn[f"out_{b}"] = {"kernel": out["kernel"][:, columns]}
        if "bias" in out and b == 0:
            attn["out_0"]["bias"] = out["bias"]

    # MLP: neurons of a choice are the leading ones of every storage group, so those of a block are scattered.
    blocks = {}
    for b, (start, stop) in enumerate(zip((0, *mlp), mlp, strict=False)):
        before, kept = (grouped_kept(c.d_mlp, n, c.elastic_groups) for n in (start, stop))
        index = np.flatnonzero(kept & ~before)
        edit = Edit(neurons=lambda leaf, axis, index=index: jnp.take(leaf, index, axis=axis))
        blocks[f"block_{b}"] = block = edit_params(params["mlp"], edit, ("mlp",))
        if b and "bias" in block["down"]:
            block["down"] = {**block["down"], "bias": jnp.zeros_like(block["down"]["bias"])}

    return {**params, "attn": attn, "mlp": blocks}

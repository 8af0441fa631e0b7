"""Grouped-query attention over the keys and values of a cache and of new tokens (Ainslie et al. 2023).

    q, k, v = W_qkv x                                   G query heads per key/value head
    out     = W_out concat_h softmax(scale q_h k^T) v   over the keys that `visible` shows to a query

ALiBi (Press et al. 2022) adds -m_h times the distance of query and key to the logits of head h.

Every key carries its position, and a query sees the keys at positions up to its own. Causality, padding and
stale cache entries all follow from this rule, so that no masks are passed around.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.nn import kernels, sequence
from elastic_lm.nn.linear import Linear
from elastic_lm.nn.norm import Norm
from elastic_lm.nn.rope import Rotation, apply_rope, rotation_at

HIDDEN_POSITION = jnp.iinfo(jnp.int32).max  # position of a key that no query may see
LONG = 1024  # queries per row up to which all logits are held at once
CHUNK = 256  # queries per row whose logits are held at once, where there are more
FEW_QUERIES = 8  # most queries per key/value head that are a matrix-vector product each on CPU
_LOGITS, _VALUES = "bkmh,bksh->bkms", "bkms,bksh->bkmh"
NewKeyValues = tuple[jax.Array, jax.Array]  # keys and values of new tokens, [B, K, T, H] each
Penalties = Callable[[jax.Array, jax.Array], jax.Array]  # positions of queries and keys -> [B, N, T, S]


@flax.struct.dataclass
class KeyValues:
    """Keys and values of one layer, with what decides who may see them.

    Attributes:
      k: [B, K, S, H] keys, already rotated.
      v: [B, K, S, H] values.
      positions: [B, S] int32 position of each key; `HIDDEN_POSITION` hides it.
      segments: [B, S] int32 document ids for packed training batches, or None.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segments: jax.Array | None = None


@flax.struct.dataclass
class AttentionContext:
    """Where the new tokens of one layer stand, and what they see besides each other.

    Attributes:
      positions: [B, T] int32 positions of the new tokens.
      segments: [B, T] int32 document ids of the new tokens; None = one document per row.
      window: a token sees only the last `window` positions; 0 = all. An int is static, an array traced.
      past: the layer's cached keys and values, or None.
      biases: [N, T, S] float32 each, added to the logits of every row, or [B, N, T, S]: one of `past`, where
        there is a past, and one of the new tokens. None = no biases.
      rotation: of the new tokens, if layers share one (`rope.shared_rotations`); None = each computes it.
      lengths: [B, T or 1] int32 length of the text of each new token, where positions do not tell
        (`rope.rotation_at`); None = they do.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    window: int | jax.Array = 0
    past: KeyValues | None = None
    biases: Sequence[jax.Array] | None = None
    rotation: Rotation | None = None
    lengths: jax.Array | None = None

    def rotation_of(self, config: ModelConfig) -> Rotation:
        """How queries and keys of a model (static) with rotary positions are rotated."""
        if self.rotation is not None:
            return self.rotation
        lengths = text_lengths(self.positions, self.lengths, cached=self.past is not None)
        return rotation_at(config, self.positions, lengths)


class Attention(nn.Module):
    """Projections, rotary positions and attention of one layer.

    `qkv` holds queries, keys and values in one kernel [K, G + 2, H, D]: for every key/value head its
    G query heads, then the key, then the value. One large product; tensor parallelism slices K.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: AttentionContext, gate_BTN: jax.Array | None = None
    ) -> tuple[jax.Array, NewKeyValues]:
        """Attends over the past and the new tokens.

        Args:
          x_BTD: normalised input.
          context: positions of the tokens, and what they see.
          gate_BTN: factors of the query heads' outputs (`width.gated`), or None.

        Returns:
          ([B, T, D], new keys and values).
        """
        c = self.config
        b, t, _ = x_BTD.shape

        shape = (c.n_kv_heads, c.group_size + 2, c.head_dim)
        axes = ("kv_heads", None, None, "embed")
        qkv = Linear(shape, axes, c.qkv_bias, c.param_dtype, name="qkv")(x_BTD)
        q, k, v = qkv[:, :, :, : c.group_size], qkv[:, :, :, c.group_size], qkv[:, :, :, -1]
        q = q.reshape(b, t, c.n_heads, c.head_dim)

        if c.qk_norm:
            q = norm_heads(c, Norm("rmsnorm", c.norm_eps, c.norm_offset, c.param_dtype, name="q_norm"), q)
            k = norm_heads(c, Norm("rmsnorm", c.norm_eps, c.norm_offset, c.param_dtype, name="k_norm"), k)

        # Keys are rotated before they are cached, so that a cache is never rotated again.
        if c.rotates:
            rotation = context.rotation_of(c)
            q, k = (apply_rope(x, rotation, c.rope.interleaved) for x in (q, k))
        if c.query_growth:
            q = grown(c, q, context.positions)

        new = KeyValues(jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), context.positions, context.segments)
        out = by_kernel(c, q, new, context)
        if out is None:
            out = attend(q, new, context, scale=c.query_scale, softcap=c.attn_softcap, alibi=alibi_of(c))
        out = out if gate_BTN is None else out * gate_BTN[..., None]

        out = out.reshape(b, t, math.prod(out.shape[2:]))
        axes = ("embed", "heads")
        out = Linear((c.d_model,), axes, c.out_bias, c.param_dtype, name="out")(out)
        return out, (new.k, new.v)


def norm_heads(config: ModelConfig, norm: Callable[[jax.Array], jax.Array], x_BTNH: jax.Array) -> jax.Array:
    """Queries or keys normalised: every head, or all heads of a token at once (`qk_norm_whole`)."""
    if not config.qk_norm_whole:
        return norm(x_BTNH)
    b, t, n, h = x_BTNH.shape
    return norm(x_BTNH.reshape(b, t, n * h)).reshape(x_BTNH.shape)


def grown(config: ModelConfig, q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Queries times 1 + b ln(1 + p // L) at position p: sharper beyond the pretrained context (Llama 4)."""
    stretches = positions_BT // config.rope.original_max_len
    growth_BT = 1.0 + config.query_growth * jnp.log1p(stretches.astype(jnp.float32))
    return q_BTNH * growth_BT[..., None, None].astype(q_BTNH.dtype)


def text_lengths(positions_BT: jax.Array, lengths_BT: jax.Array | None, *, cached: bool) -> jax.Array | None:
    """Lengths for `rope.rotation_at`: those that are given, or what positions tell.

    After a cache, new positions belong to the text that they continue. Some of them may lie beyond its end,
    so that each is taken by itself.

    Args:
      positions_BT: int32 positions of the new tokens.
      lengths_BT: int32 [B, T or 1], or None.
      cached: whether there is a past; static.
    """
    return positions_BT + 1 if lengths_BT is None and cached else lengths_BT


def attend(
    q_BTNH: jax.Array,
    new: KeyValues,
    context: AttentionContext,
    *,
    scale: float,
    softcap: float = 0.0,
    alibi: Penalties | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v over `context.past` and `new`.

    Of long texts, whose logits would need [B, N, T, S] numbers, a few queries are processed at a time, and
    once more for the gradient, so that memory grows with T and not with its square.

    Args:
      q_BTNH: queries, already rotated.
      new: keys and values of the new tokens, or whatever else all queries may see.
      context: positions of the queries, and what they see.
      scale: multiplies q.k; static.
      softcap: logits pass softcap * tanh(x / softcap); 0 = off; static.
      alibi: from `alibi_of`, or None; static.

    Returns:
      [B, T, N, H] in the dtype of `q_BTNH`; probabilities are float32.
    """
    run = functools.partial(_attend, scale=scale, softcap=softcap, alibi=alibi)
    t = q_BTNH.shape[1]
    if sequence.parts() > 1:
        new = dataclasses.replace(new, k=sequence.gathered(new.k), v=sequence.gathered(new.v))
    # A device has its part of the queries, and all keys.
    if t * t <= LONG * LONG * sequence.parts() or context.biases is not None:
        return run(q_BTNH, new, context)

    # Queries that fill up the last chunk stand before every key, and see none. If devices divide them, each
    # has as many of a chunk.
    own = -(-CHUNK // sequence.parts())
    chunks = functools.partial(sequence.pieces, chunk=own * sequence.parts())
    segments = None if context.segments is None else chunks(context.segments)
    each = chunks(q_BTNH), chunks(context.positions, fill=-1), segments

    @jax.checkpoint
    def chunk(queries: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q_BTNH, positions, segments = queries
        return run(q_BTNH, new, dataclasses.replace(context, positions=positions, segments=segments))

    return sequence.joined(jax.lax.map(chunk, each), t)


def by_kernel(
    config: ModelConfig, q_BTNH: jax.Array, new: KeyValues, context: AttentionContext
) -> jax.Array | None:
    """Attention by the kernel of the step that is traced (`nn.kernels`); None = there is none for this layer.

    Args:
      config: the model; static.
      q_BTNH: queries, already rotated.
      new: keys and values of the same tokens.
      context: positions of the queries, and what they see.

    Raises:
      ValueError: the step asks for a kernel by name, and it does not serve the model.
    """
    kernel = kernels.current()
    if kernel is None or context.past is not None:
        return None
    unserved = kernels.unserved(kernel, q_BTNH, new.k.shape[1], softcap=config.attn_softcap)
    if config.position == "alibi" or context.biases is not None:
        unserved = "biases are added to the logits"
    require(not unserved or not kernel.required, "train.attention", kernel.name, f"{unserved}; set 'auto'")
    if unserved:
        return None

    if kernel.name == "cudnn":
        return kernels.cudnn(kernel, q_BTNH, new.k, new.v, visible(context, new), scale=config.query_scale)
    return kernels.splash(
        kernel,
        q_BTNH,
        new.k,
        new.v,
        context.segments,
        context.window,
        config.windows,
        scale=config.query_scale,
        softcap=config.attn_softcap,
    )


def _attend(
    q_BTNH: jax.Array,
    new: KeyValues,
    context: AttentionContext,
    *,
    scale: float,
    softcap: float,
    alibi: Penalties | None,
) -> jax.Array:
    """`attend` with all logits at once. Past and new keys are not concatenated: that would copy a cache."""
    b, t, n, h = q_BTNH.shape
    group_size = n // new.k.shape[1]
    parts = [new] if context.past is None else [context.past, new]

    # M = G * T: the queries that share a key/value head are one product, and keys are not repeated.
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(b, t, -1, group_size, h), 1, 3)
    # Where devices divide the queries, no device has G * T of them in a row.
    merge = sequence.parts() == 1
    queries = q_BKGTH.reshape(b, -1, group_size * t, h) if merge else q_BKGTH

    logits = []  # [B, K, G, T, S] of each part
    for i, part in enumerate(parts):
        if merge:
            s = _products(_LOGITS, queries, part.k, jnp.float32) * scale
        else:
            s = jnp.einsum("bkgth,bksh->bkgts", queries, part.k, preferred_element_type=jnp.float32) * scale
        s = softcap * jnp.tanh(s / softcap) if softcap else s
        s = s.reshape(b, -1, group_size, t, part.k.shape[2])
        s = s if context.biases is None else s + context.biases[i].reshape(-1, *s.shape[1:])
        if alibi is not None:
            s += alibi(context.positions, part.positions).reshape(-1, *s.shape[1:])
        # The least float32, not -inf: a query that sees nothing, as in padding, must not give NaN.
        seen_BTS = visible(context, part)
        logits.append(jnp.where(seen_BTS[:, None, None], s, jnp.finfo(jnp.float32).min))

    # One softmax over all parts. The largest logit cancels, so it gets no gradient.
    top = [jnp.max(s, axis=-1, keepdims=True) for s in logits]
    peak = jax.lax.stop_gradient(jnp.max(jnp.concatenate(top, axis=-1), axis=-1, keepdims=True))
    weights = [jnp.exp(s - peak) for s in logits]
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)

    if merge:
        out = sum(
            _products(
                _VALUES,
                (w / total).reshape(b, -1, group_size * t, w.shape[-1]).astype(part.v.dtype),
                part.v,
            )
            for w, part in zip(weights, parts, strict=True)
        )
    else:
        out = sum(
            jnp.einsum("bkgts,bksh->bkgth", (w / total).astype(part.v.dtype), part.v)
            for w, part in zip(weights, parts, strict=True)
        )
    out = jnp.asarray(out).reshape(b, -1, group_size, t, h)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, n, h)


def _products(
    names: str, x_BKMI: jax.Array, keys_BKSH: jax.Array, dtype: DTypeLike | None = None
) -> jax.Array:
    """The product of the queries of each key/value head with its keys, or of weights with its values.

    A query of one row at a time is a matrix-vector product, for which XLA's CPU backend writes code. Products
    of few queries go to a library there, whose calls take longer than the work (20 to 30 microseconds each,
    of 760 that a layer of 3.5 million parameters takes).

    Args:
      names: `_LOGITS` or `_VALUES`; static.
      x_BKMI: queries, or weights.
      keys_BKSH: keys, or values.
      dtype: dtype in which products are accumulated and returned; None = that of `x_BKMI`.

    Returns:
      [B, K, M, S or H].
    """
    b, _, m, _ = x_BKMI.shape
    together = functools.partial(jnp.einsum, names, preferred_element_type=dtype)
    if b > 1 or not 0 < m <= FEW_QUERIES:
        return together(x_BKMI, keys_BKSH)

    one = functools.partial(jnp.einsum, names.replace("m", ""), preferred_element_type=dtype)

    def one_by_one(x_BKMI: jax.Array, keys_BKSH: jax.Array) -> jax.Array:
        return jnp.stack([one(x_BKMI[:, :, i], keys_BKSH) for i in range(m)], axis=2)

    return jax.lax.platform_dependent(x_BKMI, keys_BKSH, cpu=one_by_one, default=together)


def alibi_slopes(config: ModelConfig) -> np.ndarray:
    """[N] float32 slopes m_h, times the model's scale: 2^(-8 i / N), i = 1 .. N, where N is a power of two.

    For other N, the slopes of the power of two below come first, and then every other one of those of the
    power above.
    """
    below = 2 ** int(math.log2(config.n_heads))
    exponents = np.concatenate([np.arange(1, below + 1) / below, np.arange(1, 2 * below, 2) / (2 * below)])
    slopes = np.exp2(-8 * exponents[: config.n_heads])
    return (config.alibi_scale * slopes).astype(np.float32)


def alibi_of(config: ModelConfig) -> Penalties | None:
    """What is added to the logits of a model with position='alibi'; None = nothing."""
    return functools.partial(alibi_penalties, config) if config.position == "alibi" else None


def alibi_penalties(config: ModelConfig, queries_BT: jax.Array, keys_BS: jax.Array) -> jax.Array:
    """[B, N, T, S] float32: slopes times positions of keys from those of queries, which are not before them.

    Args:
      config: static; `alibi_rounded` rounds slopes, positions and their products to bfloat16.
      queries_BT: int32 positions.
      keys_BS: int32 positions.
    """
    if not config.alibi_rounded:
        nearness_BTS = keys_BS[:, None, :] - queries_BT[:, :, None]
        return jnp.asarray(alibi_slopes(config))[:, None, None] * nearness_BTS[:, None]

    slopes_N = alibi_slopes(dataclasses.replace(config, alibi_scale=1.0))

    def at(positions_BT: jax.Array) -> jax.Array:
        """[B, N, T] penalties from position 0."""
        products = _bfloat16(slopes_N)[:, None] * _bfloat16(positions_BT)[:, None]
        return config.alibi_scale * _bfloat16(products)

    return at(keys_BS)[:, :, None] - at(queries_BT)[..., None]


def _bfloat16(x: jax.Array | np.ndarray) -> jax.Array:
    """The nearest bfloat16 numbers as float32; XLA leaves out a cast to and fro."""
    return jax.lax.reduce_precision(jnp.asarray(x, jnp.float32), exponent_bits=8, mantissa_bits=7)


def visible(context: AttentionContext, keys: KeyValues) -> jax.Array:
    """Marks the keys that each query may attend to: no later ones, in the window and of the same document.

    Args:
      context: positions and documents of the queries, and their window.
      keys: positions and documents of the keys. Documents are compared only if both the queries and the keys
        have them.

    Returns:
      [B, T, S] bool.
    """
    query, key = context.positions[:, :, None], keys.positions[:, None, :]
    seen = key <= query

    # A scan over layers traces the window, which is then 0 for layers that see everything.
    if not isinstance(context.window, int):
        seen &= (context.window == 0) | (query - key < context.window)
    elif context.window:
        seen &= query - key < context.window

    if context.segments is not None and keys.segments is not None:
        seen &= context.segments[:, :, None] == keys.segments[:, None, :]
    return seen


def seen_by_all(mask_BS: jax.Array) -> jax.Array:
    """Positions [B, S] int32 of keys that queries at position 0 see in both directions, except for padding.

    Args:
      mask_BS: bool, True for tokens that count.
    """
    return jnp.where(mask_BS, 0, HIDDEN_POSITION)

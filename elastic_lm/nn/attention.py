"""Grouped-query attention over one or several stretches of keys and values."""

import math
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.nn.linear import Linear
from elastic_lm.nn.norm import Norm
from elastic_lm.nn.rope import apply_rope, rope_frequencies

HIDDEN_POSITION = jnp.iinfo(jnp.int32).max  # position of a key that no query may see
NewKeyValues = tuple[jax.Array, jax.Array]  # keys and values of new tokens, [B, K, T, H] each


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


def attend(
    q_BTNH: jax.Array,
    parts: list[KeyValues],
    positions_BT: jax.Array,
    *,
    scale: float,
    window: int | jax.Array = 0,
    softcap: float = 0.0,
    segments_BT: jax.Array | None = None,
    biases: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """Causal attention of queries over the concatenation of `parts`, without concatenating them.

    Args:
      q_BTNH: queries, already rotated.
      parts: stretches of keys and values; every query sees keys at positions up to its own.
      positions_BT: int32 positions of the queries.
      scale: multiplies q.k; static.
      window: a query sees only the last `window` positions; 0 = all. Static or traced.
      softcap: logits pass softcap * tanh(x / softcap); 0 = off; static.
      segments_BT: document ids of the queries, matched against `KeyValues.segments`.
      biases: [N, T, S] float32, one per part, added to the logits of every row; None = none.

    Returns:
      [B, T, N, H] in the dtype of `q_BTNH`; probabilities are float32.
    """
    b, t, n, h = q_BTNH.shape
    groups = n // parts[0].k.shape[1]
    q_BKGTH = jnp.moveaxis(q_BTNH.reshape(b, t, -1, groups, h), 1, 3)
    q_BKMH = q_BKGTH.reshape(b, -1, groups * t, h)  # M = G * T: one product per kv head
    logits = []
    for i, part in enumerate(parts):
        s = jnp.einsum("bkmh,bksh->bkms", q_BKMH, part.k, preferred_element_type=jnp.float32) * scale
        s = softcap * jnp.tanh(s / softcap) if softcap else s
        s = s.reshape(b, -1, groups, t, part.k.shape[2])
        s = s if biases is None else s + biases[i].reshape(s.shape[1:])
        seen_BTS = visible(positions_BT, part.positions, window, segments_BT, part.segments)
        logits.append(jnp.where(seen_BTS[:, None, None], s, jnp.finfo(jnp.float32).min))
    top = [jnp.max(s, axis=-1, keepdims=True) for s in logits]
    peak = jax.lax.stop_gradient(jnp.max(jnp.concatenate(top, axis=-1), axis=-1, keepdims=True))
    weights = [jnp.exp(s - peak) for s in logits]
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    out = sum(
        jnp.einsum(
            "bkms,bksh->bkmh", (w / total).reshape(b, -1, groups * t, w.shape[-1]).astype(p.v.dtype), p.v
        )
        for w, p in zip(weights, parts, strict=True)
    )
    out = jnp.asarray(out).reshape(b, -1, groups, t, h)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, n, h)


def visible(
    query_BT: jax.Array,
    key_BS: jax.Array,
    window: int | jax.Array = 0,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
) -> jax.Array:
    """Which keys each query may attend to: not later, within the window, of the same document.

    Args:
      query_BT: int32 positions of the queries.
      key_BS: int32 positions of the keys.
      window: a query sees only the last `window` positions; 0 = all. Static or traced.
      query_segments: [B, T] int32 document ids, or None.
      key_segments: [B, S] int32 document ids, or None; documents are told apart where both are given.

    Returns:
      [B, T, S] bool.
    """
    query, key = query_BT[:, :, None], key_BS[:, None, :]
    seen = key <= query
    if not isinstance(window, int):
        seen &= (window == 0) | (query - key < window)
    elif window:
        seen &= query - key < window
    if query_segments is not None and key_segments is not None:
        seen &= query_segments[:, :, None] == key_segments[:, None, :]
    return seen


class Attention(nn.Module):
    """Projections, rotary positions and attention of one layer.

    `qkv` holds queries, keys and values in one kernel [K, G + 2, H, D]: for every key/value head its
    G query heads, then the key, then the value. One large product; tensor parallelism slices K.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        *,
        window: int | jax.Array = 0,
        segments_BT: jax.Array | None = None,
        past: KeyValues | None = None,
        gate_BTN: jax.Array | None = None,
        biases: Sequence[jax.Array] | None = None,
    ) -> tuple[jax.Array, NewKeyValues]:
        """Attends over `past` and the new tokens; returns the output and the new keys and values.

        Args:
          x_BTD: normalised input.
          positions_BT: int32 positions of the new tokens.
          window: see `attend`.
          segments_BT: document ids of the new tokens, or None.
          past: cached keys and values, or None.
          gate_BTN: multiplies what query heads give (see `nn.router`), or None.
          biases: see `attend`; of `past` and of the new tokens, or of these alone without a past.

        Returns:
          ([B, T, D], (k [B, K, T, H], v [B, K, T, H])).
        """
        c = self.config
        b, t, _ = x_BTD.shape
        shape = (c.n_kv_heads, c.group_size + 2, c.head_dim)
        axes = ("kv_heads", None, None, "embed")
        qkv = Linear(shape, axes, c.qkv_bias, c.param_dtype, name="qkv")(x_BTD)
        q, k, v = qkv[:, :, :, : c.group_size], qkv[:, :, :, c.group_size], qkv[:, :, :, -1]
        q = q.reshape(b, t, c.n_heads, c.head_dim)
        if c.qk_norm:
            q = Norm("rmsnorm", c.norm_eps, c.norm_offset, c.param_dtype, name="q_norm")(q)
            k = Norm("rmsnorm", c.norm_eps, c.norm_offset, c.param_dtype, name="k_norm")(k)
        if c.position == "rope":
            frequency, factor = rope_frequencies(c.rope, c.rotary_dim, c.max_len)
            q = apply_rope(q, positions_BT, frequency, factor)
            k = apply_rope(k, positions_BT, frequency, factor)
        new = KeyValues(jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), positions_BT, segments_BT)
        parts = [new] if past is None else [past, new]
        out = attend(
            q,
            parts,
            positions_BT,
            scale=c.query_scale,
            window=window,
            softcap=c.attn_softcap,
            segments_BT=segments_BT,
            biases=biases,
        )
        out = out if gate_BTN is None else out * gate_BTN[..., None]
        out = out.reshape(b, t, math.prod(out.shape[2:]))
        axes = ("embed", "heads")
        out = Linear((c.d_model,), axes, c.out_bias, c.param_dtype, name="out")(out)
        return out, (new.k, new.v)

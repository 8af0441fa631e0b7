"""Key/value caches with one rule: entries at or above a layer's progress `done` are stale.

Stale entries are hidden from every query and overwritten before they count. A tick therefore writes its block
of entries at `done` without a mask, whether all of them are valid or not. Inside a conditional a cache is
either written in place or handed through; the compiler does this without a copy if it knows that every read
comes before the write (`after`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.nn.attention import HIDDEN_POSITION, KeyValues

LayerCache = tuple[jax.Array, jax.Array]  # keys and values of one layer, [B, K, S, H] each


def cache_bytes(config: ModelConfig, rows: int, capacity: int) -> int:
    """Bytes that the caches of a model's layers take.

    Args:
      config: the model.
      rows: of the batch.
      capacity: positions per row.
    """
    groups = sum(config.sizes(layer)[2] for layer in range(config.n_layers))
    return 2 * groups * config.head_dim * rows * capacity * jnp.dtype(config.dtype).itemsize


def past(cache: LayerCache, done_B: jax.Array) -> KeyValues:
    """What the queries of a tick see of a cache: the entries that are not stale.

    Args:
      cache: of one layer, [B, K, S, H] each.
      done_B: int32, positions that the layer has processed.

    Returns:
      The same arrays with the position of each entry, or `HIDDEN_POSITION` from `done_B` on.
    """
    b, _, s, _ = cache[0].shape
    index = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))
    return KeyValues(cache[0], cache[1], jnp.where(index < done_B[:, None], index, HIDDEN_POSITION))


def after(read_BTD: jax.Array, start_B: jax.Array) -> jax.Array:
    """Orders a write after the reads of the same cache.

    Args:
      read_BTD: anything that was computed from the cache.
      start_B: int32 positions at which the write starts.

    Returns:
      `start_B`, but known only once `read_BTD` is.
    """
    # Adds 0: nothing is above infinity. XLA does not know that and has to wait for the value.
    return start_B + (read_BTD[:, 0, 0] > jnp.inf)


def write(cache: LayerCache, new_kv: LayerCache, start_B: jax.Array) -> LayerCache:
    """Writes new keys and values at positions start_B .. start_B + T - 1 of every row.

    Args:
      cache: of one layer, [B, K, S, H] each.
      new_kv: [B, K, T, H] each, of any float dtype.
      start_B: int32, or a scalar for all rows; the caller keeps start_B + T within S.

    Returns:
      The cache with these entries replaced.
    """
    return _write(cache[0], new_kv[0], start_B), _write(cache[1], new_kv[1], start_B)


def write_all(
    caches: Sequence[LayerCache], new_kv: Sequence[LayerCache], hidden_BTD: jax.Array, start_B: jax.Array
) -> tuple[LayerCache, ...]:
    """Writes the new keys and values of successive layers, each as soon as its own cache has been read.

    If all writes waited for the last layer, they would become ready at once, and XLA's CPU backend would hand
    some of so many to another thread, which costs more than the writes themselves.

    Args:
      caches: of the layers, [B, K, S, H] each.
      new_kv: of the layers, [B, K, T, H] each, of any float dtype.
      hidden_BTD: state that left the last of the layers.
      start_B: int32 first position that is written, or a scalar for all rows.

    Returns:
      The caches with these entries replaced.
    """
    # The keys of the layer above are computed from the output of a layer, so after every read of its cache.
    above = [jnp.swapaxes(keys, 1, 2)[:, :, 0] for keys, _ in new_kv[1:]]
    return tuple(
        write(layer, kv, after(read, start_B))
        for layer, kv, read in zip(caches, new_kv, (*above, hidden_BTD), strict=True)
    )


def _write(cache_BKSH: jax.Array, new_BKTH: jax.Array, start_B: jax.Array) -> jax.Array:
    new_BKTH = new_BKTH.astype(cache_BKSH.dtype)
    # One start for all rows makes one slice; `vmap` over starts becomes a scatter, which is slower.
    if start_B.ndim == 0 or cache_BKSH.shape[0] == 1:
        start = start_B.reshape(())
        return jax.lax.dynamic_update_slice(cache_BKSH, new_BKTH, (0, 0, start, 0))
    return jax.vmap(lambda c, r, i: jax.lax.dynamic_update_slice(c, r, (0, i, 0)))(
        cache_BKSH, new_BKTH, start_B
    )


def from_prefill(kv: LayerCache, capacity: int) -> LayerCache:
    """A cache that begins with the keys and values of a prompt.

    Args:
      kv: [B, K, T, H] each.
      capacity: S, static, at least T.

    Returns:
      The cache, [B, K, S, H] each; zeros from T on.
    """
    room = capacity - kv[0].shape[2]
    pad = [(0, 0), (0, 0), (0, room), (0, 0)]
    return jnp.pad(kv[0], pad), jnp.pad(kv[1], pad)

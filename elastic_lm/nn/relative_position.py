"""Relative positions as biases of attention logits, one per head and bucket of distances (T5)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.nn.partition import partitioned


class RelativeBias(nn.Module):
    """Owns the biases [R, N] of a stack, all of whose layers use them, or of one layer (UMT5).

    Attributes:
      config: the model; static.
      both_directions: whether half of the buckets are for keys after the query; static.
    """

    config: EncoderDecoderConfig | EncoderConfig
    both_directions: bool

    @nn.compact
    def __call__(self, query_T: jax.Array, key_S: jax.Array) -> jax.Array:
        """[N, T, S] float32 biases of queries and keys at these int32 positions."""
        c = self.config
        init = partitioned(nn.initializers.normal(c.d_model**-0.5), (None, "kv_heads"))
        table = self.param("table", init, (c.relative_buckets, c.n_heads), c.param_dtype)
        bucket_TS = relative_buckets(
            query_T,
            key_S,
            both_directions=self.both_directions,
            buckets=c.relative_buckets,
            max_distance=c.relative_max_distance,
        )
        return jnp.moveaxis(table.astype(jnp.float32)[bucket_TS], -1, 0)


def sinusoids(places: int, width: int) -> np.ndarray:
    """[places, width] float32 vectors of positions: sines in the first half, cosines in the second (Marian).

    The wavelengths grow from 2 pi to 10,000 times that (arXiv 1706.03762, sec. 3.5).

    Args:
      places: number of positions.
      width: of a vector, even.
    """
    angle = np.arange(places)[:, None] / np.power(10000.0, np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def relative_buckets(
    query_T: jax.Array, key_S: jax.Array, *, both_directions: bool, buckets: int, max_distance: int
) -> jax.Array:
    """The bucket of every pair of positions.

    Args:
      query_T: int32 positions of queries.
      key_S: int32 positions of keys.
      both_directions: the second half of the buckets is for keys after the query; if False, these are all in
        bucket 0. Static.
      buckets: their number; static.
      max_distance: from here on, all distances are in the last bucket; static.

    Returns:
      [T, S] int32 in 0 .. buckets - 1.
    """
    ahead_TS = key_S[None, :] - query_T[:, None]
    one_way = buckets // 2 if both_directions else buckets
    table = jnp.asarray(distance_buckets(one_way, max_distance))
    distance_TS = jnp.abs(ahead_TS) if both_directions else jnp.maximum(-ahead_TS, 0)
    bucket_TS = table[jnp.minimum(distance_TS, max_distance)]
    return bucket_TS + jnp.where(ahead_TS > 0, one_way, 0) if both_directions else bucket_TS


def distance_buckets(buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every distance in one direction (arXiv 1910.10683, sec. 2.1).

    The first half of the buckets are single distances, the others grow with the logarithm:
    half + floor(half * ln(d / half) / ln(max_distance / half)), at most buckets - 1.

    Args:
      buckets: their number in this direction.
      max_distance: from here on, all distances are in the last bucket.

    Returns:
      [max_distance + 1] int32.
    """
    # On the host and in float32: logarithms must round as in the checkpoints' own code, since a distance at
    # the edge of two buckets would otherwise get another bias.
    half = buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, half).astype(np.float32) / np.float32(half)
    growth = np.log(ratio) / np.float32(math.log(max_distance / half)) * np.float32(buckets - half)
    far = np.minimum(half + growth.astype(np.int32), buckets - 1)
    return np.where(distance < half, distance, far).astype(np.int32)

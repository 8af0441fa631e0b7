"""Disentangled attention: vectors of distances that queries and keys meet (DeBERTa, arXiv 2006.03654, eq. 4).

    A_ij = q_i k_j + q_i (W_k r(i - j)) + k_j (W_q r(i - j)),        scaled by (3 H)^-1/2

r(d) is the vector of the bucket of the signed distance d from key to query. In version 2 the vectors pass the
projections W_q and W_k that states pass.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Distances:
    """What attention knows of distances.

    Attributes:
      vectors: [2 R, D] of the buckets -R .. R - 1.
      index: [T, T] int32, which of them belongs to a query and a key.
    """

    vectors: jax.Array
    index: jax.Array


def distance_biases(
    q_BTNH: jax.Array, k_BTNH: jax.Array, distance_q: jax.Array, distance_k: jax.Array, index_TS: jax.Array
) -> jax.Array:
    """The second and the third term of A, not scaled.

    Args:
      q_BTNH: queries.
      k_BTNH: keys.
      distance_q: [2 R, N, H] vectors of distances, projected like queries.
      distance_k: [2 R, N, H] the same, projected like keys.
      index_TS: from `distance_index`.

    Returns:
      [B, N, T, S] float32.
    """
    query_BNTR = jnp.einsum("btnh,rnh->bntr", q_BTNH, distance_k, preferred_element_type=jnp.float32)
    key_BNSR = jnp.einsum("bsnh,rnh->bnsr", k_BTNH, distance_q, preferred_element_type=jnp.float32)
    of_query = jnp.take_along_axis(query_BNTR, index_TS[None, None], axis=-1)
    of_key = jnp.take_along_axis(key_BNSR, index_TS.T[None, None], axis=-1)
    return of_query + jnp.swapaxes(of_key, 2, 3)


def distance_index(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Which vector belongs to every query and key of a text.

    Args:
      length: T, tokens of the text.
      buckets: R, in one direction; 0 = every distance below `max_distance` is a bucket of its own.
      max_distance: from about here on, all distances are in the last bucket.

    Returns:
      [T, T] int32 in 0 .. 2 R - 1.
    """
    place = np.arange(length)
    ahead = place[:, None] - place[None, :]
    bucket = log_buckets(length, buckets, max_distance)[np.abs(ahead)] if buckets else np.abs(ahead)
    span = buckets or max_distance
    return np.clip(np.sign(ahead) * bucket + span, 0, 2 * span - 1).astype(np.int32)


def log_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every distance in one direction; half of them are single distances, as in DeBERTa v2.

    The others grow with the logarithm: half + ceil((half - 1) ln(d / half) / ln((max_distance - 1) / half)).

    Args:
      length: distances 0 .. length - 1.
      buckets: R.
      max_distance: which has the last bucket.

    Returns:
      [length] int32, beyond `max_distance` above R - 1.
    """
    # On the host and in float32, as in `relative_position.distance_buckets`.
    half = buckets // 2
    distance = np.arange(length)
    ratio = np.maximum(distance, half).astype(np.float32) / np.float32(half)
    growth = np.log(ratio) / np.log(np.float32((max_distance - 1) / half)) * np.float32(half - 1)
    return np.where(distance <= half, distance, np.ceil(growth).astype(np.int32) + half)

"""A part of the vocabulary that stands for all of it, so that exits train on a fraction of the products.

Of the V tokens, S are those that come nearest to the full model's choice anywhere in a row of text, by
max_t (z_tv - max_w z_tw), of all rows of a batch together. In every step, further ones are drawn at random
from all V; the n that are new, N, stand for (V - |S|) / n tokens each:

    sum_v exp(z_v)  is estimated by  sum_{v in S} exp(z_v) + (V - |S|) / n  sum_{v in N} exp(z_v)

which is unbiased (importance sampling; Bengio & Senecal 2008) unless no new one is drawn. The same columns
serve the full model and all of its exits, and p and q are both normalised by their estimates. The full
model's own choices come first in S: all are there if it has room for as many as a row has tokens.
"""

import flax.struct
import jax
import jax.numpy as jnp

RANDOM_SHARE = 4  # one column in so many is drawn at random


@flax.struct.dataclass
class Columns:
    """Columns of a batch's logits.

    Attributes:
      ids: [C] int32, tokens.
      offsets: [C] float32, what is added to their logits: the log of how many tokens each stands for, or a
        very negative number for a token that is there already.
    """

    ids: jax.Array
    offsets: jax.Array


def nearness(logits_TV: jax.Array) -> jax.Array:
    """max_t (z_tv - max_w z_tw): [V] float32, how near every token comes to the likeliest one, at most 0.

    Args:
      logits_TV: float32, of the full model.
    """
    return jnp.max(logits_TV - jnp.max(logits_TV, axis=-1, keepdims=True), axis=0)


def likeliest(nearness_BV: jax.Array, count: int) -> jax.Array:
    """The tokens of every row that are nearest to the likeliest one somewhere in it.

    Args:
      nearness_BV: float32, of every row.
      count: tokens per row; static.

    Returns:
      [B, count] int32, different tokens.
    """
    return jax.lax.top_k(nearness_BV, count)[1].astype(jnp.int32)


def columns(likeliest_BK: jax.Array, vocab: int, drawn: int, key: jax.Array) -> Columns:
    """The likeliest tokens of all rows, and tokens drawn at random.

    Args:
      likeliest_BK: int32, from `likeliest`.
      vocab: V; static.
      drawn: R, tokens that are drawn from all; static.
      key: typed PRNG key.

    Returns:
      Columns, C = B K + R.
    """
    never = -1e30  # finite, so that differences of logits are numbers
    ids = jnp.sort(likeliest_BK.ravel())
    first = jnp.append(True, ids[1:] != ids[:-1])

    others = jnp.sort(jax.random.randint(key, (drawn,), 0, vocab, jnp.int32))
    place = jnp.minimum(jnp.searchsorted(ids, others), len(ids) - 1)
    new = (ids[place] != others) & jnp.append(True, others[1:] != others[:-1])
    each = (vocab - jnp.sum(first)) / jnp.maximum(jnp.sum(new), 1)

    offsets = jnp.where(first, 0.0, never), jnp.where(new, jnp.log(jnp.maximum(each, 1e-30)), never)
    return Columns(jnp.concatenate([ids, others]), jnp.concatenate(offsets).astype(jnp.float32))

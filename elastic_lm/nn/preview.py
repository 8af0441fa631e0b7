"""A preview of a vocabulary head: all logits from a few numbers, exact ones for the rows that matter.

With W the head [V, D] and f its input, r directions that were chosen by data (`depth.previewing`) split W f
into what r numbers say and a rest:

    s = U (P f)                       U [V, r], P [r, D]: previewed logits of all rows
    K = rows of the k blocks of b consecutive rows whose largest s is largest
    z_v = W_v f  for v in K,   z_v = s_v  for the others
    sure = max_K z - (k-th largest of the blocks' maxima) >= m

A preview reads r / D + k b / V of the head's bytes. No previewed logit outside K exceeds the k-th maximum, so
that where the gap is at least m, only an error of the preview above m can hide the largest logit; elsewhere
the whole head is read. m is calibrated on text.

Paper: SVD-softmax, NeurIPS 2017, chooses directions by W alone.
"""

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.nn.linear import linear


@flax.struct.dataclass
class HeadPreview:
    """Arrays of a preview, which are traced, and the sizes of its blocks, which are static.

    Attributes:
      down: [r, D], P.
      up: [V, r], U.
      margin: [] float32, m; 0 = always sure, infinity = never.
      blocks: k.
      block: b.
    """

    down: jax.Array
    up: jax.Array
    margin: jax.Array
    blocks: int = flax.struct.field(pytree_node=False, default=64)
    block: int = flax.struct.field(pytree_node=False, default=16)


@flax.struct.dataclass
class Previewed:
    """Logits of a preview, before softcap and temperature.

    Attributes:
      logits: [..., V] float32, exact in the kept rows.
      gap: [...] float32, by how much the largest exact logit exceeds every previewed one that was not kept.
    """

    logits: jax.Array
    gap: jax.Array


def preview_logits(preview: HeadPreview, features: jax.Array, kernel_VD: jax.Array) -> Previewed:
    """All logits, exact for the blocks of rows whose previewed ones are largest.

    Args:
      preview: of the head.
      features: [..., D] input of the head.
      kernel_VD: the whole head.

    Returns:
      Previewed; a token is sure where its gap is at least the preview's margin.
    """
    vocab_size, block = kernel_VD.shape[0], preview.block
    x_ND = features.reshape(-1, features.shape[-1])
    n = len(x_ND)

    scores_NV = linear(linear(x_ND, preview.down), preview.up, dtype=jnp.float32)
    short = -vocab_size % block
    padded = jnp.pad(scores_NV, [(0, 0), (0, short)], constant_values=-jnp.inf)
    largest = jnp.max(padded.reshape(n, -1, block), axis=-1)
    top, index = jax.lax.top_k(largest, min(preview.blocks, largest.shape[1]))

    # Rows behind the end of a vocabulary that is no multiple of a block are dropped when they are written.
    rows = (index[..., None] * block + jnp.arange(block)).reshape(n, -1)
    kept = kernel_VD[jnp.minimum(rows, vocab_size - 1)].astype(features.dtype)
    exact = jnp.einsum("nkd,nd->nk", kept, x_ND, preferred_element_type=jnp.float32)
    exact = jnp.where(rows < vocab_size, exact, -jnp.inf)
    logits = scores_NV.at[jnp.arange(n)[:, None], rows].set(exact, mode="drop")

    gap = jnp.max(exact, axis=-1) - top[:, -1]
    lead = features.shape[:-1]
    return Previewed(logits.reshape(*lead, vocab_size), gap.reshape(lead))

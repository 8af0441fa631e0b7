"""A preview of a vocabulary head: all logits from a few numbers, exact ones for the rows that matter.

With W the head's kernel [V, D], b its bias, 0 for most models, and f its input, coordinates c = P f that were
chosen by data (`depth.previewing`) are uncorrelated, have variance 1, and are ordered by what they add to the
logits. The first r of them give

    s = U c_{1..r} + b                              previewed logits of all rows; U [V, r]
    rho = |c_{r+1..D}| / sqrt(D - r)                how large the part is that they leave out, about 1
    K = rows of the k blocks of b consecutive rows with the largest  max_block (s_v + rho sigma_v)
    z_v = W_v f + b_v  for v in K,   z_v = s_v  for the others
    sure = (max_K z - the k-th of these maxima) / rho >= m

with sigma_v the standard deviation of what U leaves out in row v. No row outside K can be the largest unless
its error exceeds m + 1 standard deviations or so; where the gap is smaller than m the whole head is read, and
m is calibrated on text. At batch 1, a sure preview reads r / D + k b / V + D / V of the head's bytes.

Paper: SVD-softmax, NeurIPS 2017, chooses directions by W alone and has no second look.
"""

import hashlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.nn.linear import linear
from elastic_lm.nn.vocab_head import Head

SAMPLED_ROWS = 16  # of a head, that its fingerprint reads
TINY = 1e-12  # keeps a preview of all coordinates, which leaves nothing out, from dividing by 0


@flax.struct.dataclass
class HeadPreview:
    """Arrays of a preview, which are traced, and the sizes of its blocks, which are static.

    Attributes:
      down: [D, D], P.
      up: [V, r], U.
      spread: [V] float32, sigma.
      margin: [] float32, m; -infinity = always sure, infinity = never.
      blocks: k.
      block: b.
      head: `head_fingerprint` of W and b; "" = of a head that was not recorded.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el

      ones = jnp.ones((61, 8))  # of a head of 61 rows and 32 columns
      preview = el.depth.HeadPreview(jnp.eye(32), ones, jnp.ones(61), jnp.float32(4.0))
      stricter = preview.replace(margin=jnp.float32(6.0))  # traced: nothing compiles again
      assert stricter.rank == 8
      ```
    """

    down: jax.Array
    up: jax.Array
    spread: jax.Array
    margin: jax.Array
    blocks: int = flax.struct.field(pytree_node=False, default=512)
    block: int = flax.struct.field(pytree_node=False, default=4)
    head: str = flax.struct.field(pytree_node=False, default="")

    @property
    def rank(self) -> int:
        """r."""
        return self.up.shape[1]


@flax.struct.dataclass
class Previewed:
    """Logits of a preview, before softcap and temperature.

    Attributes:
      logits: [..., V] float32, exact in the kept rows.
      gap: [...] float32, by how much the largest exact logit exceeds what rows that were not kept could have,
        in standard deviations of the preview's errors.
    """

    logits: jax.Array
    gap: jax.Array


def preview_logits(preview: HeadPreview, features: jax.Array, head: Head) -> Previewed:
    """All logits, exact for the blocks of rows whose previewed ones are largest.

    Args:
      preview: of the head.
      features: [..., D] input of the head.
      head: the whole head.

    Returns:
      Previewed; a token is sure where its gap is at least the preview's margin.
    """
    vocab_size, block = head.kernel.shape[0], preview.block
    x_ND = features.reshape(-1, features.shape[-1])
    n = len(x_ND)

    scores_NV, hopeful_NV, rho_N1 = preview_scores(preview, head, x_ND)
    largest = jnp.max(by_block(hopeful_NV, block), axis=-1)
    top, index = jax.lax.top_k(largest, min(preview.blocks, largest.shape[1]))

    # Rows behind the end of a vocabulary that is no multiple of a block are dropped when they are written.
    rows = (index[..., None] * block + jnp.arange(block)).reshape(n, -1)
    kept = head.rows(jnp.minimum(rows, vocab_size - 1))
    exact = jnp.einsum(
        "nkd,nd->nk", kept.kernel.astype(features.dtype), x_ND, preferred_element_type=jnp.float32
    )
    exact = exact if kept.bias is None else exact + kept.bias.astype(exact.dtype)
    exact = jnp.where(rows < vocab_size, exact, -jnp.inf)
    logits = scores_NV.at[jnp.arange(n)[:, None], rows].set(exact, mode="drop")

    gap = (jnp.max(exact, axis=-1) - top[:, -1]) / rho_N1[:, 0]
    lead = features.shape[:-1]
    return Previewed(logits.reshape(*lead, vocab_size), gap.reshape(lead))


def preview_scores(
    preview: HeadPreview, head: Head, x_ND: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Previewed logits s [N, V], s + rho sigma [N, V], and rho [N, 1], float32."""
    coordinates = linear(x_ND, preview.down, dtype=jnp.float32)
    leading_NR = coordinates[:, : preview.rank].astype(x_ND.dtype)
    scores_NV = linear(leading_NR, preview.up, head.bias, dtype=jnp.float32)
    rest_ND = jnp.square(coordinates[:, preview.rank :])
    rest_N1 = jnp.sum(rest_ND, axis=-1, keepdims=True) / max(rest_ND.shape[1], 1)
    rho_N1 = jnp.sqrt(rest_N1 + TINY)
    return scores_NV, scores_NV + rho_N1 * preview.spread, rho_N1


def by_block(x_NV: jax.Array, block: int) -> jax.Array:
    """[N, blocks, b], the last block filled up with -infinity."""
    n, vocab_size = x_NV.shape
    padded = jnp.pad(x_NV, [(0, 0), (0, -vocab_size % block)], constant_values=-jnp.inf)
    return padded.reshape(n, -1, block)


def head_fingerprint(head: Head) -> str:
    """16 hexadecimal digits that tell one vocabulary head from another, from its size and a few of its rows.

    The rows are rounded to bfloat16, so that a model which is loaded in another dtype has the same head.
    """
    rows = jnp.asarray(np.linspace(0, head.kernel.shape[0] - 1, SAMPLED_ROWS).astype(np.int32))
    digest = hashlib.sha256(repr(head.kernel.shape).encode())
    for leaf in jax.tree.leaves(head.rows(rows)):
        digest.update(np.asarray(leaf.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]

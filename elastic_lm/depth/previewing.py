"""Previews of the vocabulary head, chosen by data and calibrated like every approximation.

With S = E[f f^T] over the features f that the head reads, L its Cholesky factor, W the head and V the right
singular vectors of W L, the leading r of them give the preview with the least mean squared error of all
logits:

    P = V^T L^-1,     U = the first r columns of W L V,     sigma_v^2 = sum_{i > r} (W L V)_{v i}^2

Directions that features never take cost nothing: a plain SVD of W, without S, keeps far fewer of the largest
logits. The margin is the smallest under which at most `1 - agreement` of other tokens are given a token that
is not the whole head's; rank and number of blocks are those that should take the least time then, by bytes
that are read and how.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from elastic_lm.config.checks import require, require_at_least_1
from elastic_lm.config.decoding import PREVIEW_AGREEMENT
from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Arrays, Batch, as_batches
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.finite import is_finite, overflow_error
from elastic_lm.nn.preview import (
    HeadPreview,
    by_block,
    head_fingerprint,
    preview_logits,
    preview_scores,
)
from elastic_lm.nn.vocab_head import Head

RANKS = (64, 96, 128, 192)  # candidates, as far as they are below D
BLOCKS = (256, 512, 1024)  # candidates for the number of blocks
SCATTERED = 4.0  # time of a byte of the exact rows, which lie apart, relative to one of the head (measured)
CHUNK = 64  # tokens whose logits are alive at once
KEPT = 6144  # tokens that the margin is chosen and measured on, half each


@dataclasses.dataclass(frozen=True)
class PreviewReport:
    """What a preview does on tokens that it was not chosen on.

    Attributes:
      rank: r.
      blocks: k.
      margin: m.
      agreement: share of tokens whose largest logit is the whole head's.
      whole: share of tokens for which the whole head is read.
      bytes: of the head's bytes, the share that a token reads on average at batch 1. A batch reads the whole
        head as soon as the preview of one of its rows is not sure.
      variation: mean total variation distance from the whole head's distribution.
      tokens: how many tokens these are of.

    Example:
      ```python
      import elastic_lm as el

      report = el.depth.PreviewReport(
          rank=128,
          blocks=512,
          margin=4.0,
          agreement=0.9997,
          whole=0.03,
          bytes=0.31,
          variation=0.03,
          tokens=3072,
      )
      assert report.bytes < 1
      ```
    """

    rank: int
    blocks: int
    margin: float
    agreement: float
    whole: float
    bytes: float
    variation: float
    tokens: int


def fit_preview(
    config: ModelConfig,
    params: Params,
    batches: Iterable[Batch | Arrays],
    *,
    agreement: float = PREVIEW_AGREEMENT,
    ranks: Sequence[int] = RANKS,
    blocks: Sequence[int] = BLOCKS,
    block: int = HeadPreview.block,
    seed: int = 0,
) -> tuple[HeadPreview, PreviewReport]:
    """Chooses directions, rank and margin of a preview in one pass over text.

    Args:
      config: the model; static under `jit`.
      params: its parameters, canonical or stacked.
      batches: packed batches, or dicts of their fields, at least 4; targets are not read.
      agreement: share of tokens that must keep the whole head's choice.
      ranks: candidates for r.
      blocks: candidates for k, the number of blocks of rows that are exact.
      block: b, rows of a block.
      seed: which tokens choose the margin and which measure it.

    Returns:
      (the preview, what it does on tokens that neither directions nor margin were chosen on).

    Raises:
      ValueError: the agreement is no share, a size is below 1, or there is too little text.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config()
      tokens = random_tokens(config, batch=32, length=17)
      ones = jnp.ones((32, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      preview, report = el.depth.fit_preview(config, random_params(config), [batch] * 4, ranks=(8, 16))
      print(f"{report.agreement:.2%} of the tokens kept for {report.bytes:.0%} of the head's bytes")
      ```
    """
    sizes = {"ranks": ranks, "blocks": blocks, "block": block, "seed": seed}
    return fit_previews(config, params, batches, (agreement,), **sizes)[agreement]


def fit_previews(
    config: ModelConfig,
    params: Params,
    batches: Iterable[Batch | Arrays],
    agreements: Sequence[float],
    *,
    ranks: Sequence[int] = RANKS,
    blocks: Sequence[int] = BLOCKS,
    block: int = HeadPreview.block,
    seed: int = 0,
) -> dict[float, tuple[HeadPreview, PreviewReport]]:
    """`fit_preview` for several agreements, in one pass; arguments as there."""
    for agreement in agreements:
        require(0 < agreement < 1, "agreement", agreement, "must be a share between 0 and 1")
    for name, sizes in (("ranks", tuple(ranks)), ("blocks", tuple(blocks))):
        require(min(sizes, default=0) >= 1, name, sizes, "give at least one candidate, each of at least 1")
    require_at_least_1("block", block)

    moment, kept = _features(config, params, batches, seed)
    if len(kept) < 64:
        raise ValueError(f"batches: {len(kept)} held-out tokens are too few to calibrate on; give more text")

    head = vocab_head(config, params)
    below = [rank for rank in ranks if rank < config.d_model] or [config.d_model - 1]
    down, up = directions(np.asarray(head.kernel, np.float64), moment)
    fingerprint = head_fingerprint(head)

    half = len(kept) // 2
    choosing, measuring = kept[:half], kept[half:]
    best: dict[float, tuple[float, HeadPreview]] = {}
    for rank in below:
        widest = make_preview(down, up, rank, head.kernel.dtype, blocks=max(blocks), block=block)
        gaps, rights = trial(widest, choosing, head, tuple(blocks))
        for count, gap, right in zip(blocks, gaps, rights, strict=True):
            for agreement in agreements:
                margin = least_margin(gap, right, agreement)
                preview = dataclasses.replace(
                    widest, blocks=count, margin=jnp.float32(margin), head=fingerprint
                )
                cost = _bytes(preview, head, float(np.mean(gap < margin)), SCATTERED)
                if agreement not in best or cost < best[agreement][0]:
                    best[agreement] = cost, preview
    return {
        agreement: (preview, _report(preview, head, *outcomes(preview, measuring, head)))
        for agreement, (_, preview) in best.items()
    }


def measure_preview(
    config: ModelConfig,
    params: Params,
    batches: Iterable[Batch | Arrays],
    preview: HeadPreview,
) -> PreviewReport:
    """What a preview does on other text.

    Args:
      config: the model; static under `jit`.
      params: its parameters, canonical or stacked.
      batches: packed batches, or dicts of their fields; targets are not read.
      preview: of this model.
    """
    head = vocab_head(config, params)
    parts = []
    for batch in as_batches(batches):
        features, _ = _batch_features(config.with_exits(()), params, batch)
        parts.append(outcomes(preview, _counted(features, batch), head))
    gap, right, variation = map(np.concatenate, zip(*parts, strict=True))
    return _report(preview, head, gap, right, variation)


def _report(
    preview: HeadPreview, head: Head, gap: np.ndarray, right: np.ndarray, variation: np.ndarray
) -> PreviewReport:
    """What a preview does on the tokens that these `outcomes` are of."""
    unsure = gap < float(preview.margin)
    return PreviewReport(
        rank=preview.rank,
        blocks=preview.blocks,
        margin=float(preview.margin),
        agreement=float(np.mean(right | unsure)),
        whole=float(np.mean(unsure)),
        bytes=_bytes(preview, head, float(np.mean(unsure))),
        variation=float(np.mean(np.where(unsure, 0.0, variation))),
        tokens=len(gap),
    )


def directions(kernel_VD: np.ndarray, moment_DD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P [D, D] and W L V [V, D], ordered by what each coordinate adds to the logits.

    Args:
      kernel_VD: W, float64.
      moment_DD: S = E[f f^T], float64.
    """
    ridge = 1e-6 * np.trace(moment_DD) / len(moment_DD)
    factor = np.linalg.cholesky(moment_DD + ridge * np.eye(len(moment_DD)))
    # The right singular vectors of W L are the eigenvectors of L^T W^T W L, which is only [D, D].
    _, vectors = np.linalg.eigh(factor.T @ (kernel_VD.T @ kernel_VD) @ factor)
    vectors = vectors[:, ::-1]
    down = scipy.linalg.solve_triangular(factor, vectors, lower=True, trans=1).T
    return down, kernel_VD @ (factor @ vectors)


def make_preview(
    down_DD: np.ndarray, up_VD: np.ndarray, rank: int, dtype: Any, *, blocks: int, block: int
) -> HeadPreview:
    """A preview by the leading coordinates, which is always sure.

    Args:
      down_DD: first result of `directions`.
      up_VD: second result.
      rank: r.
      dtype: of the head.
      blocks: k.
      block: b.
    """
    return HeadPreview(
        down=jnp.asarray(down_DD, dtype),
        up=jnp.asarray(up_VD[:, :rank], dtype),
        spread=jnp.asarray(np.linalg.norm(up_VD[:, rank:], axis=1), jnp.float32),
        margin=jnp.float32(-np.inf),
        blocks=blocks,
        block=block,
    )


def least_margin(gap: np.ndarray, right: np.ndarray, agreement: float) -> float:
    """The smallest margin under which at most 1 - agreement of the tokens are sure and wrong.

    Args:
      gap: [N] float32.
      right: [N] bool, the preview's largest logit is the whole head's.
      agreement: a share in (0, 1).
    """
    wrong = np.sort(gap[~right])[::-1]
    allowed = math.floor((1 - agreement) * len(gap))
    if len(wrong) <= allowed:
        return -math.inf
    return float(np.nextafter(wrong[allowed], np.float32(np.inf), dtype=np.float32))


def _features(
    config: ModelConfig, params: Params, batches: Iterable[Batch | Arrays], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """S over three batches of four, and at most KEPT features [N, D] of the others, drawn at random."""
    moment, count = np.zeros((config.d_model,) * 2), 0.0
    kept, draws = np.zeros((0, config.d_model), jnp.dtype(config.dtype)), np.zeros(0)
    rng = np.random.default_rng(seed)
    for i, batch in enumerate(as_batches(batches)):
        features, own = _batch_features(config.with_exits(()), params, batch)
        if i % 4 < 3:
            moment += np.asarray(own, np.float64)
            count += np.sum(np.asarray(batch.weights) > 0)
            continue
        # The tokens with the smallest draws stay, so that however much text there is, few are in memory.
        new = _counted(features, batch)
        kept, draws = np.concatenate([kept, new]), np.concatenate([draws, rng.random(len(new))])
        first = np.argsort(draws)[:KEPT]
        kept, draws = kept[first], draws[first]
    if not count or not len(kept):
        raise ValueError("batches: at least 4 are needed, one in four measures what the others chose")
    if not (is_finite(moment) and is_finite(kept)):
        raise overflow_error("batches: the features of the vocabulary head", params, config.dtype)
    return moment / count, kept


@functools.partial(jax.jit, static_argnames="config")
def _batch_features(config: ModelConfig, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Features [N, D] of a batch, and the sum of f f^T over its counted tokens. Static: the config."""
    decoder = Decoder(config).bind({"params": params})
    tap = decoder.taps(batch.tokens, [config.n_layers], batch.positions, batch.segments)
    features = decoder.final_features(tap[config.n_layers].hidden).reshape(-1, config.d_model)
    f = jnp.where(batch.weights.reshape(-1, 1) > 0, features, 0).astype(jnp.float32)
    return features, jnp.einsum("nd,ne->de", f, f, precision=jax.lax.Precision.HIGHEST)


def _counted(features: jax.Array, batch: Batch) -> np.ndarray:
    """[n, D] features of the counted tokens, on the host."""
    return np.asarray(features)[np.asarray(batch.weights).reshape(-1) > 0]


def vocab_head(config: ModelConfig, params: Params) -> Head:
    """The vocabulary head that a preview is of."""
    return Decoder(config).bind({"params": params}).final_head()


def trial(
    preview: HeadPreview, features: np.ndarray, head: Head, blocks: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Gaps, and whether the largest logit is the right one, for several numbers of blocks at once.

    Args:
      preview: with the largest of these numbers of blocks.
      features: [N, D].
      head: the whole head.
      blocks: candidates for k.

    Returns:
      (gaps [len(blocks), N], [len(blocks), N] bool), as `outcomes` gives them for each number.
    """
    parts = _by_chunk(lambda x: _trial_chunk(preview, x, head, blocks), features)
    gap, right = (np.concatenate(column, axis=1)[:, : len(features)] for column in zip(*parts, strict=True))
    return gap, right


@functools.partial(jax.jit, static_argnames="blocks")
def _trial_chunk(
    preview: HeadPreview, features_ND: jax.Array, head: Head, blocks: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """`trial` of a chunk. The whole head is read anyway, so that the kept rows need not be gathered."""
    whole_NV = head.logits(features_ND)
    scores_NV, hopeful_NV, rho_N1 = preview_scores(preview, head, features_ND)
    largest = jnp.max(by_block(hopeful_NV, preview.block), axis=-1)
    top, index = jax.lax.top_k(largest, min(preview.blocks, largest.shape[1]))

    n, vocab_size = whole_NV.shape
    last = top.shape[1]  # rank of every block that none of these numbers keeps
    rank = jnp.full(largest.shape, last).at[jnp.arange(n)[:, None], index].set(jnp.arange(last))
    rank_NV = jnp.repeat(rank, preview.block, axis=1)[:, :vocab_size]

    def one(count: int) -> tuple[jax.Array, jax.Array]:
        kept_NV = rank_NV < count
        best = jnp.max(jnp.where(kept_NV, whole_NV, -jnp.inf), axis=1)
        # Rows that are not kept take part with their previewed logits, as they do when text is decoded.
        found = jnp.argmax(jnp.where(kept_NV, whole_NV, scores_NV), axis=1)
        return (best - top[:, min(count, last) - 1]) / rho_N1[:, 0], found == jnp.argmax(whole_NV, axis=1)

    gap, right = zip(*map(one, blocks), strict=True)
    return jnp.stack(gap), jnp.stack(right)


def outcomes(
    preview: HeadPreview, features: np.ndarray, head: Head
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token: gap, whether the largest logit is the right one, and the total variation distance."""
    parts = _by_chunk(lambda x: _outcome(preview, x, head), features)
    gap, right, variation = (np.concatenate(column)[: len(features)] for column in zip(*parts, strict=True))
    return gap, right, variation


def _by_chunk(run: Callable[[np.ndarray], Any], features: np.ndarray) -> list[Any]:
    """Results for `CHUNK` tokens at a time, the last of them padded with zeros."""
    padded = np.pad(features, [(0, -len(features) % CHUNK), (0, 0)])
    return [jax.device_get(run(part)) for part in np.split(padded, len(padded) // CHUNK)]


@jax.jit
def _outcome(
    preview: HeadPreview, features_ND: jax.Array, head: Head
) -> tuple[jax.Array, jax.Array, jax.Array]:
    found = preview_logits(preview, features_ND, head)
    whole = head.logits(features_ND)
    right = jnp.argmax(found.logits, axis=-1) == jnp.argmax(whole, axis=-1)
    distance = jnp.abs(jax.nn.softmax(found.logits) - jax.nn.softmax(whole))
    return found.gap, right, jnp.sum(distance, axis=-1) / 2


def _bytes(preview: HeadPreview, head: Head, whole: float, scattered: float = 1.0) -> float:
    """Share of the head's bytes that a token reads at batch 1, or with `scattered` of the time of as many."""
    vocab_size, width = head.kernel.shape
    exact = min(preview.blocks * preview.block, vocab_size)
    own = preview.up.size + preview.down.size + scattered * exact * width
    return own / (vocab_size * width) + whole

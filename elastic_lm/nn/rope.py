"""Rotary position embedding (Su et al. 2021) and its long-context scalings."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import ModelConfig, RopeConfig


class Rotation(NamedTuple):
    """How positions are rotated; the same for every head, and for every layer of one kind.

    Attributes:
      cos: [B, T, 1, R] float32 cosines of the angles of R pairs, times the attention factor.
      sin: their sines, likewise.
    """

    cos: jax.Array
    sin: jax.Array


def rotation_at(
    config: ModelConfig,
    positions_BT: jax.Array,
    lengths_BT: jax.Array | None = None,
    rope: RopeConfig | None = None,
) -> Rotation:
    """The rotation at some positions, computed in float32.

    Args:
      config: of a model with rotary positions; static.
      positions_BT: int32 positions in tokens.
      lengths_BT: int32 length of the text that each token is part of, [B, T or 1], which decides about the
        factors of "longrope"; None = a text ends with the last position of its row. Documents that are packed
        into one row are then rotated alike, by the longest position of any of them.
      rope: the rotation of some layers; None = the model's own; static.
    """
    rope = rope or config.rope
    frequency, factor = rope_frequencies(rope, config.rotary_dim, config.max_len)
    if rope.scaling == "longrope":
        lengths_BT = jnp.max(positions_BT, axis=-1, keepdims=True) + 1 if lengths_BT is None else lengths_BT
        is_long = (lengths_BT > rope.original_max_len)[..., None, None]
        stretched, _ = rope_frequencies(rope, config.rotary_dim, config.max_len, is_long=True)
        frequency = jnp.where(is_long, stretched, frequency)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    return Rotation(jnp.cos(angle) * factor, jnp.sin(angle) * factor)


def shared_rotations(
    config: ModelConfig, positions_BT: jax.Array, layers: Iterable[int], lengths_BT: jax.Array | None = None
) -> list[Rotation | None]:
    """`rotation_at` of each layer, computed once for all that rotate alike; None where a layer does not.

    Args:
      config: static.
      positions_BT: int32 positions in tokens.
      layers: counted from 0; static.
      lengths_BT: as in `rotation_at`.
    """
    ropes = [config.rope_of(layer) for layer in layers]

    # Without the barrier, XLA's CPU backend computes a sine and a cosine for every dimension of every head,
    # in every layer.
    rotations = {
        rope: jax.lax.optimization_barrier(rotation_at(config, positions_BT, lengths_BT, rope))
        for rope in ropes
        if rope is not None
    }
    return [None if rope is None else rotations[rope] for rope in ropes]


def scanned_rotations(
    config: ModelConfig, positions_BT: jax.Array
) -> tuple[np.ndarray, Callable[[jax.Array], Rotation | None]]:
    """What a scan over layers that rotate differently needs.

    Args:
      config: static.
      positions_BT: int32 positions in tokens.

    Returns:
      ([L] int32 kind of every layer, traced kind -> its rotation). The rotation is None where all layers are
      alike, which compute it themselves.
    """
    if config.layers_rotate_alike:
        return np.zeros(config.n_layers, np.int32), lambda kind: None

    ropes = [config.rope_of(layer) for layer in range(config.n_layers)]
    kinds = list(dict.fromkeys(ropes))

    def rotation_of(rope: RopeConfig | None) -> Rotation:
        if rope is not None:
            return rotation_at(config, positions_BT, rope=rope)
        cos, sin = rotation_at(config, positions_BT)
        return Rotation(jnp.ones_like(cos), jnp.zeros_like(sin))

    rotations = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(rotation_of, kinds))
    of_layers = np.asarray([kinds.index(rope) for rope in ropes], np.int32)
    return of_layers, lambda kind: jax.tree.map(lambda leaf: leaf[kind], rotations)


def apply_rope(x_BTNH: jax.Array, rotation: Rotation, interleaved: bool = False) -> jax.Array:
    """Rotates the leading 2 R dimensions of every head, first half against second.

    Args:
      x_BTNH: queries or keys.
      rotation: at their positions.
      interleaved: rotates neighbours instead, even dimensions against odd ones; static.

    Returns:
      Array like `x_BTNH`.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    x = x_BTNH.astype(jnp.float32)
    if interleaved:
        a, b, rest = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
        pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        rotated = jnp.concatenate([pairs.reshape(*x.shape[:-1], 2 * half), rest], axis=-1)
        return rotated.astype(x_BTNH.dtype)

    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def rope_frequencies(
    rope: RopeConfig, rotary_dim: int, max_len: int, *, is_long: bool = False
) -> tuple[np.ndarray, float]:
    """Angular frequency of every rotated pair, and the factor on cos and sin.

    Args:
      rope: the variant; static.
      rotary_dim: rotated dimensions per head (even).
      max_len: context of the model in tokens, used if `rope.original_max_len` is 0.
      is_long: of texts that are longer than `rope.original_max_len`, to which longrope gives other factors.

    Returns:
      ([rotary_dim // 2] float32 radians per token, attention factor).
    """
    # In float32, bit by bit as checkpoints were trained: after thousands of tokens one ulp shows.
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequency = np.float32(1) / np.power(np.float32(rope.theta), exponent)

    original = rope.original_max_len or max_len
    if rope.scaling == "linear":
        return (frequency / rope.factor).astype(np.float32), 1.0
    if rope.scaling == "llama3":
        return _llama3(rope, frequency, original).astype(np.float32), 1.0
    if rope.scaling == "yarn":
        attention = rope.attention_factor or (0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0)
        return _yarn(rope, frequency, rotary_dim, original).astype(np.float32), attention
    if rope.scaling == "longrope":
        factors = np.asarray(rope.long_factors if is_long else rope.short_factors, np.float32)
        stretched = np.float32(1) / (factors * np.power(np.float32(rope.theta), exponent))
        return stretched, rope.attention_factor or _longrope_attention(rope)
    # "dynamic" equals plain RoPE up to the pretrained context, which is where we stop: `ModelConfig` has no
    # longer `max_len` then, and `Decoder` refuses longer rows.
    return frequency.astype(np.float32), 1.0


def _llama3(rope: RopeConfig, frequency: np.ndarray, original: int) -> np.ndarray:
    """Llama 3.1: stretch long wavelengths, keep short ones, blend between."""
    wavelength = 2 * np.pi / frequency
    low, high = original / rope.low_freq_factor, original / rope.high_freq_factor
    keep = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - keep) * frequency / rope.factor + keep * frequency
    stretched = np.where(wavelength > low, frequency / rope.factor, frequency)
    return np.where((wavelength <= low) & (wavelength >= high), blended, stretched)


def _longrope_attention(rope: RopeConfig) -> float:
    """LongRoPE (arXiv 2402.13753): longer contexts have sharper attention."""
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_len))


def _yarn(rope: RopeConfig, frequency: np.ndarray, dim: int, original: int) -> np.ndarray:
    """YaRN (Peng et al. 2023), NTK-by-parts: a linear ramp between stretched and kept pairs."""

    def pair_of(rotations: float) -> float:
        """Which pair turns so many times within the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return frequency / rope.factor * ramp + frequency * (1 - ramp)

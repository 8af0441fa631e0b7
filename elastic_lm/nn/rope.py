"""Rotary position embedding (Su et al. 2021) and its long-context scalings."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import ModelConfig, RopeConfig


class Rotation(NamedTuple):
    """How positions are rotated; the same for every layer and head.

    Attributes:
      cos: [B, T, 1, R] float32 cosines of the angles of R pairs, times the attention factor.
      sin: their sines, likewise.
    """

    cos: jax.Array
    sin: jax.Array


def rotation_at(config: ModelConfig, positions_BT: jax.Array) -> Rotation:
    """The rotation at some positions, computed in float32.

    Args:
      config: of a model with rotary positions; static.
      positions_BT: int32 positions in tokens.
    """
    frequency, factor = rope_frequencies(config.rope, config.rotary_dim, config.max_len)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    return Rotation(jnp.cos(angle) * factor, jnp.sin(angle) * factor)


def shared_rotation(config: ModelConfig, positions_BT: jax.Array) -> Rotation | None:
    """`rotation_at`, computed once for all layers; None without rotary positions.

    Args:
      config: static.
      positions_BT: int32 positions in tokens.
    """
    if config.position != "rope":
        return None

    # Without the barrier, XLA's CPU backend computes a sine and a cosine for every dimension of every head,
    # in every layer.
    return jax.lax.optimization_barrier(rotation_at(config, positions_BT))


def apply_rope(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the leading 2 R dimensions of every head, first half against second.

    Args:
      x_BTNH: queries or keys.
      rotation: at their positions.

    Returns:
      Array like `x_BTNH`.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    x = x_BTNH.astype(jnp.float32)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def rope_frequencies(rope: RopeConfig, rotary_dim: int, max_len: int) -> tuple[np.ndarray, float]:
    """Angular frequency of every rotated pair, and the factor on cos and sin.

    Args:
      rope: the variant; static.
      rotary_dim: rotated dimensions per head (even).
      max_len: context of the model in tokens, used if `rope.original_max_len` is 0.

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

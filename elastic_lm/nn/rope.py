"""Rotary position embedding (Su et al. 2021) and its long-context scalings."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import RopeConfig


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, frequency: np.ndarray, factor: float) -> jax.Array:
    """Rotates the leading 2 * len(frequency) dimensions of every head, first half against second.

    Args:
      x_BTNH: queries or keys.
      positions_BT: int32 positions in tokens.
      frequency: [R] radians per token; static.
      factor: multiplies cos and sin; static.

    Returns:
      Array like `x_BTNH`; angles are computed in float32.
    """
    half = len(frequency)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
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
    # "dynamic" equals plain RoPE up to the pretrained context, which is where we stop.
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

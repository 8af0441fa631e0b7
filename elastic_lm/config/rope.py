"""How positions are rotated: part of `config.ModelConfig`."""

import dataclasses
import math
from typing import Literal, get_args

from elastic_lm.config.checks import (
    NOT_NEGATIVE,
    POSITIVE,
    require,
    require_choice,
    require_each,
    require_types,
)

RopeScaling = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and its long-context variants.

    Example:
      ```python
      import elastic_lm as el

      rope = el.RopeConfig(theta=500000.0, scaling="llama3", factor=8.0, original_max_len=8192)
      config = el.testing.tiny_config(rope=rope)
      assert config.rotary_dim == config.head_dim
      ```
    """

    theta: float = 10000.0  # base of the geometric sequence of wavelengths
    fraction: float = 1.0  # share of each head that is rotated (NeoX 0.25, Nemotron 0.5)
    scaling: RopeScaling = "none"  # how frequencies are stretched for longer contexts
    factor: float = 1.0  # stretch factor of the scaling
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_max_len / this are stretched
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_max_len / this are kept
    original_max_len: int = 0  # context the model was pretrained for; 0 = ModelConfig.max_len
    beta_fast: float = 32.0  # yarn: rotations above which a frequency is kept
    beta_slow: float = 1.0  # yarn: rotations below which a frequency is stretched
    attention_factor: float = 0.0  # yarn, longrope: multiplier of cos and sin; 0 = derived from factor
    truncate: bool = True  # yarn: round the ramp's borders to whole dimensions
    short_factors: tuple[float, ...] = ()  # longrope: stretch of every pair in texts up to original_max_len
    long_factors: tuple[float, ...] = ()  # longrope: the same in longer texts
    interleaved: bool = False  # pairs are neighbouring dimensions, instead of one of each half (Cohere)

    def __post_init__(self) -> None:
        require_types(self, "rope.")
        require_each(self, "rope.", ("theta", "low_freq_factor", "beta_fast", "beta_slow"), *POSITIVE)
        require(0 < self.fraction <= 1, "rope.fraction", self.fraction, "must be in (0, 1]")
        require_choice("rope.scaling", self.scaling, get_args(RopeScaling))
        require(1 <= self.factor < math.inf, "rope.factor", self.factor, "must be at least 1 and finite")
        require_each(self, "rope.", ("original_max_len", "attention_factor"), *NOT_NEGATIVE)
        require(
            self.scaling != "llama3" or self.high_freq_factor > self.low_freq_factor,
            "rope.high_freq_factor",
            self.high_freq_factor,
            f"must be above low_freq_factor={self.low_freq_factor}",
        )
        if self.scaling == "longrope":
            self._check_longrope()

    def _check_longrope(self) -> None:
        for field in ("short_factors", "long_factors"):
            factors = getattr(self, field)
            usable = bool(factors) and all(0 < factor < math.inf for factor in factors)
            require(usable, f"rope.{field}", factors, "must be positive numbers, one per rotated pair")
        require(
            len(self.short_factors) == len(self.long_factors),
            "rope.long_factors",
            self.long_factors,
            f"must be {len(self.short_factors)} numbers, as many as short_factors",
        )
        require(
            self.original_max_len > 1,
            "rope.original_max_len",
            self.original_max_len,
            "must be the length in tokens at which the long factors take over",
        )

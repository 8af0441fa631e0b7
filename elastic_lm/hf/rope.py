"""Rotary embeddings in config.json, old style (rope_theta, rope_scaling) and new (rope_parameters)."""

import math
from collections.abc import Mapping
from typing import Any

from elastic_lm.config.rope import RopeConfig, RopeScaling
from elastic_lm.hf.family import number, typed

ORIGINAL = "original_max_position_embeddings"

SCALINGS: dict[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
}


def rope_from_hf(
    hf: Mapping[str, Any],
    max_len: int,
    *,
    theta_key: str = "rope_theta",
    fraction_key: str = "partial_rotary_factor",
    fraction: float = 1.0,
) -> RopeConfig:
    """Reads either style of rotary settings.

    Args:
      hf: parsed config.json.
      max_len: its context length in tokens.
      theta_key: where the old style keeps the base.
      fraction_key: where the old style keeps the rotated share of each head.
      fraction: share that is rotated where the file does not say.

    Returns:
      The same settings as a RopeConfig.

    Raises:
      ValueError: the kind of scaling has no counterpart here, or one of its numbers is missing.
    """
    values = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    where = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    if not isinstance(values, Mapping) or any(isinstance(v, Mapping) for v in values.values()):
        raise ValueError(f"{where}={values!r}: must be one flat mapping that holds for every layer")
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(
            f"{where}.rope_type={kind!r} is not supported; supported: {', '.join(SCALINGS)}. "
            "Use a checkpoint without this context extension"
        )
    common: dict[str, Any] = {
        "theta": float(number(values, "rope_theta", number(hf, theta_key, _theta(hf), above=0), above=0)),
        "fraction": float(number(values, "partial_rotary_factor", number(hf, fraction_key, fraction))),
        "scaling": SCALINGS[kind],
    }
    if kind == "default":
        return RopeConfig(**common)
    if values.get("factor") is None and kind != "yarn":
        raise ValueError(f"{where}={dict(values)!r}: rope_type {kind!r} needs a factor; add it")
    original = number(hf, ORIGINAL, 0) or number(values, ORIGINAL, 0)
    if kind in ("llama3", "yarn"):
        common["original_max_len"] = int(original)
    common["factor"] = float(number(values, "factor", max_len / (original or max_len), above=0))
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            _need(values, key, where)
            common[key] = float(number(values, key, 0))
    if kind == "yarn":
        common |= _yarn(values, common["factor"])
    return RopeConfig(**common)


def _theta(hf: Mapping[str, Any]) -> float:
    return number(hf, "rope_theta", 10000.0, above=0)


def _need(values: Mapping[str, Any], key: str, where: str) -> None:
    if values.get(key) is None:
        raise ValueError(f"{where}={dict(values)!r}: {key} is missing; add it")


def _yarn(values: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The settings that only YaRN has; DeepSeek's pair of mscales becomes the attention factor."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = number(values, "attention_factor", 0)
    both = number(values, "mscale", 0), number(values, "mscale_all_dim", 0)
    if not attention and both[0] and both[1]:
        attention = mscale(both[0]) / mscale(both[1])
    return {
        "beta_fast": float(number(values, "beta_fast", 32)),
        "beta_slow": float(number(values, "beta_slow", 1)),
        "attention_factor": float(attention),
        "truncate": typed(values, "truncate", bool, True),
    }


def rope_to_hf(
    rope: RopeConfig,
    max_len: int,
    *,
    theta_key: str = "rope_theta",
    fraction_key: str | None = None,
) -> dict[str, Any]:
    """Writes both styles, so that old and new readers agree.

    Args:
      rope: settings.
      max_len: context of the model in tokens.
      theta_key: where the old style keeps the base.
      fraction_key: where the old style keeps the rotated share, for families that have one.

    Returns:
      Keys for config.json.
    """
    names = {ours: theirs for theirs, ours in SCALINGS.items()}
    values: dict[str, Any] = {"rope_type": names[rope.scaling]}
    if rope.scaling != "none":
        values["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        values[ORIGINAL] = rope.original_max_len or max_len
    if rope.scaling == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor:
            values["attention_factor"] = rope.attention_factor
    base = {"rope_theta": rope.theta}
    if fraction_key:
        base["partial_rotary_factor"] = rope.fraction
    out = {
        theta_key: rope.theta,
        "rope_scaling": dict(values) if rope.scaling != "none" else None,
        "rope_parameters": values | base,
    }
    return out | {fraction_key: rope.fraction} if fraction_key else out

"""Rotary embeddings in config.json, old style (rope_theta, rope_scaling) and new (rope_parameters)."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.rope import RopeConfig, RopeScaling
from elastic_lm.hf.family import number, typed
from elastic_lm.hf.windows import FULL, SLIDING

ORIGINAL = "original_max_position_embeddings"

SCALINGS: dict[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
}
OLD_LONGROPE = "su"  # its name in the first checkpoints

# Keys of a mapping of rotary settings. What they lack is refused, since it would change the rotation.
KNOWN = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", ORIGINAL, "finetuned",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
    "mscale_all_dim", "truncate", "short_factor", "long_factor", "max_position_embeddings",
}  # fmt: skip


def rope_from_hf(
    hf: Mapping[str, Any],
    max_len: int,
    *,
    theta_key: str = "rope_theta",
    theta: float = 10000.0,
    fraction_key: str = "partial_rotary_factor",
    fraction: float = 1.0,
    original: int = 0,
    default: Mapping[str, Any] | None = None,
    extra: Collection[str] = (),
) -> RopeConfig:
    """Reads either style of rotary settings.

    Args:
      hf: parsed config.json.
      max_len: its context length in tokens.
      theta_key: where the old style keeps the base.
      theta: the base where the file does not say.
      fraction_key: where the old style keeps the rotated share of each head.
      fraction: share that is rotated where the file does not say.
      original: length of the pretrained context where the file does not say; 0 = max_len.
      default: the settings where the file has neither style; None = rotation without scaling.
      extra: further keys of the settings, which the family reads itself.

    Returns:
      The same settings as a RopeConfig.

    Raises:
      ValueError: the kind of scaling has no counterpart here, or one of its numbers is missing.
    """
    scaling, parameters = hf.get("rope_scaling"), hf.get("rope_parameters")
    where = "rope_scaling" if scaling else "rope_parameters"
    theta = number(hf, theta_key, number(hf, "rope_theta", theta, above=0), above=0)
    fraction = number(hf, fraction_key, fraction)
    values = scaling or parameters or default or {}
    if not isinstance(values, Mapping) or any(isinstance(v, Mapping) for v in values.values()):
        raise ValueError(f"{where}={values!r}: must be one flat mapping that holds for every layer")
    original = int(number(hf, ORIGINAL, 0) or number(values, ORIGINAL, 0) or original)
    return _read_rope(values, where, max_len, theta=theta, fraction=fraction, original=original, extra=extra)


def interleaved_rope_from_hf(hf: Mapping[str, Any], max_len: int, theta: float) -> RopeConfig:
    """`rope_from_hf` for models that rotate neighbouring dimensions together.

    Args:
      hf: parsed config.json.
      max_len: longest text, tokens.
      theta: base where the file has none.
    """
    return dataclasses.replace(rope_from_hf(hf, max_len, theta=theta), interleaved=True)


def layered_ropes(
    hf: Mapping[str, Any], max_len: int, *, theta: float, local_theta: float, local_key: str | None = None
) -> dict[str, RopeConfig]:
    """Reads the rotary settings of a family whose layers with a sliding window have settings of their own.

    Args:
      hf: parsed config.json. The old style scales the layers with full attention alone.
      max_len: its context length in tokens.
      theta: base of the layers with full attention where the file does not say.
      local_theta: the same of the layers with a window.
      local_key: where the old style keeps the base of the layers with a window, if it has a place for it.

    Returns:
      ModelConfig fields `rope` and `local_rope`.

    Raises:
      ValueError: as `rope_from_hf`, or the settings are not one mapping for each kind of layer.
    """
    scaling, parameters = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    kinds = (FULL, SLIDING)
    nested = isinstance(parameters, Mapping) and all(
        key in kinds and isinstance(value, Mapping | None) for key, value in parameters.items()
    )
    if not nested or not isinstance(scaling, Mapping):
        raise ValueError(
            f"rope_parameters={parameters!r} with rope_scaling={scaling!r}: must be one mapping for each of "
            f"{' and '.join(kinds)}"
        )
    theta = number(hf, "rope_theta", theta, above=0)
    local_theta = number(hf, local_key, local_theta, above=0) if local_key else local_theta
    full, sliding = (dict(parameters.get(kind) or {}) for kind in kinds)
    where = "rope_scaling" if scaling else f"rope_parameters.{FULL}"
    return {
        "rope": _read_rope(full | dict(scaling), where, max_len, theta=theta),
        "local_rope": _read_rope(sliding, f"rope_parameters.{SLIDING}", max_len, theta=local_theta),
    }


def _read_rope(
    values: Mapping[str, Any],
    where: str,
    max_len: int,
    *,
    theta: float,
    fraction: float = 1.0,
    original: int = 0,
    extra: Collection[str] = (),
) -> RopeConfig:
    """One mapping of rotary settings, with what holds where it does not say."""
    kind = values.get("rope_type", values.get("type", "default"))
    kind = "longrope" if kind == OLD_LONGROPE else kind
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(
            f"{where}.rope_type={kind!r} is not supported; supported: {', '.join(SCALINGS)}. "
            "Use a checkpoint without this context extension"
        )
    for key, value in values.items():
        known = key in KNOWN or key in extra or value is None
        require(known, f"{where}.{key}", value, "may change the rotation, and is not known; remove it if not")
    common: dict[str, Any] = {
        "theta": float(number(values, "rope_theta", theta, above=0)),
        "fraction": float(number(values, "partial_rotary_factor", fraction)),
        "scaling": SCALINGS[kind],
    }
    original = original or int(number(values, ORIGINAL, 0))
    if kind == "default":
        return RopeConfig(**common)
    if kind == "longrope":
        return RopeConfig(**common, **_longrope(values, where, original or max_len, max_len))
    if values.get("factor") is None and kind != "yarn":
        raise ValueError(f"{where}={dict(values)!r}: rope_type {kind!r} needs a factor; add it")
    if kind in ("llama3", "yarn"):
        common["original_max_len"] = original
    common["factor"] = float(number(values, "factor", max_len / (original or max_len), above=0))
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            _need(values, key, where)
            common[key] = float(number(values, key, 0))
    if kind == "yarn":
        common |= _yarn(values, common["factor"])
    return RopeConfig(**common)


def _need(values: Mapping[str, Any], key: str, where: str) -> None:
    if values.get(key) is None:
        raise ValueError(f"{where}={dict(values)!r}: {key} is missing; add it")


def _longrope(values: Mapping[str, Any], where: str, original: int, max_len: int) -> dict[str, Any]:
    """The settings that only LongRoPE has. Contexts up to the original one are not stretched."""
    factors = {}
    for ours, theirs in (("short_factors", "short_factor"), ("long_factors", "long_factor")):
        _need(values, theirs, where)
        listed = values[theirs]
        right = isinstance(listed, list | tuple) and all(type(f) in (int, float) for f in listed)
        require(right, f"{where}.{theirs}", listed, "must be a list of numbers, one per rotated pair")
        factors[ours] = tuple(map(float, listed))
    stretch = number(values, "factor", max_len / original, above=0)
    return {
        **factors,
        "original_max_len": original,
        "factor": max(float(stretch), 1.0),
        "attention_factor": float(number(values, "attention_factor", 0)),
    }


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
    values = _written(rope, max_len)
    base = {"rope_theta": rope.theta}
    if fraction_key:
        base["partial_rotary_factor"] = rope.fraction
    out = {
        theta_key: rope.theta,
        "rope_scaling": dict(values) if rope.scaling != "none" else None,
        "rope_parameters": values | base,
    }
    return out | {fraction_key: rope.fraction} if fraction_key else out


def layered_ropes_to_hf(config: ModelConfig, local_key: str | None = None) -> dict[str, Any]:
    """Inverse of `layered_ropes`, in both styles as far as the old one goes.

    Args:
      config: the model.
      local_key: as there.
    """
    rope, local = config.rope, config.local_rope or config.rope
    full, sliding = (_written(r, config.max_len) | {"rope_theta": r.theta} for r in (rope, local))
    old = {"rope_theta": rope.theta} | ({local_key: local.theta} if local_key else {})
    scaling = _written(rope, config.max_len) if rope.scaling != "none" else None
    return old | {"rope_scaling": scaling, "rope_parameters": {FULL: full, SLIDING: sliding}}


def _written(rope: RopeConfig, max_len: int) -> dict[str, Any]:
    """The settings of the scaling alone."""
    names = {ours: theirs for theirs, ours in SCALINGS.items()}
    values: dict[str, Any] = {"rope_type": names[rope.scaling]}
    if rope.scaling == "longrope":
        values |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        values[ORIGINAL] = rope.original_max_len
        if rope.factor != max(max_len / rope.original_max_len, 1.0):
            values["factor"] = rope.factor
        if rope.attention_factor:
            values["attention_factor"] = rope.attention_factor
        return values
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
    return values

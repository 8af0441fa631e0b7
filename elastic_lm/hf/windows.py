"""Sliding windows in config.json: one for all layers (Mistral) or one kind per layer (Qwen, Gemma 2)."""

from collections.abc import Callable, Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.family import number, typed

SLIDING, FULL = "sliding_attention", "full_attention"


def read_window(hf: Mapping[str, Any], default: int) -> int:
    """The file's `sliding_window`.

    Args:
      hf: parsed config.json.
      default: tokens where the key is missing.

    Returns:
      Tokens; 0 = full attention, where the file says null.

    Raises:
      ValueError: it is not a whole number, or below 0.
    """
    if "sliding_window" not in hf:
        return default
    window = number(hf, "sliding_window", 0)
    require(window == int(window), "sliding_window", window, "must be a whole number of tokens")
    return int(window)


def read_pattern(hf: Mapping[str, Any], default: int) -> int:
    """The file's `sliding_window_pattern`: every so many layers, one has full attention.

    Args:
      hf: parsed config.json; `layer_types` says the same in newer files.
      default: layers where the key is missing.

    Raises:
      ValueError: it is not a whole number of at least 1.
    """
    period = typed(hf, "sliding_window_pattern", int, default)
    require(period >= 1, "sliding_window_pattern", period, "must be at least 1")
    return period


def _read_kinds(hf: Mapping[str, Any]) -> list[str]:
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"layer_types={kinds!r}: must be a list of {FULL!r} and {SLIDING!r}")
    return kinds


def uniform_windows(hf: Mapping[str, Any], layers: int, default: int) -> tuple[int, ...]:
    """Windows of a family whose layers all share `sliding_window`.

    Args:
      hf: parsed config.json.
      layers: number of layers.
      default: window in tokens where the file does not say.

    Returns:
      One window per layer, or () where attention is full.

    Raises:
      ValueError: the file gives kinds of attention per layer that differ from each other.
    """
    window = read_window(hf, default)
    kinds = set(_read_kinds(hf))
    if kinds - {SLIDING if window else FULL}:
        raise ValueError(
            f"layer_types={hf['layer_types']!r} with sliding_window={window}: "
            f"model_type {hf.get('model_type')!r} has one window for all layers; remove layer_types"
        )
    return (window,) * layers if window else ()


def layered_windows(
    hf: Mapping[str, Any], layers: int, window: int, sliding: Callable[[int], bool]
) -> tuple[int, ...]:
    """Windows of a family that gives each layer a kind of attention.

    Args:
      hf: parsed config.json; `layer_types` decides where it is present.
      layers: number of layers.
      window: the sliding window in tokens; 0 = none.
      sliding: layer -> whether it slides, where the file has no `layer_types`.

    Returns:
      One window per layer, or () where attention is full everywhere.

    Raises:
      ValueError: `layer_types` has the wrong length, an unknown kind, or slides without a window.
    """
    kinds = _read_kinds(hf) or [SLIDING if window and sliding(i) else FULL for i in range(layers)]
    if len(kinds) != layers or set(kinds) - {SLIDING, FULL}:
        raise ValueError(
            f"layer_types={kinds!r}: must be {layers} entries (num_hidden_layers), "
            f"each {FULL!r} or {SLIDING!r}"
        )
    if SLIDING in kinds and not window:
        raise ValueError(
            f"layer_types={kinds!r}: {SLIDING} needs a window, but sliding_window="
            f"{hf.get('sliding_window')!r} and use_sliding_window={hf.get('use_sliding_window')!r}; set both"
        )
    windows = tuple(window if kind == SLIDING else 0 for kind in kinds)
    return windows if any(windows) else ()


def layer_types(windows: tuple[int, ...], layers: int) -> list[str]:
    """Inverse of `layered_windows`: the kind of attention of every layer.

    Args:
      windows: tokens per layer, 0 = full; () = full everywhere.
      layers: number of layers.

    Returns:
      One kind per layer, as config.json has them under `layer_types`.
    """
    return [SLIDING if window else FULL for window in windows or (0,) * layers]


def write_layered_windows(config: ModelConfig) -> dict[str, Any]:
    """The kind of attention of every layer, and the window of those that slide.

    Args:
      config: the model.

    Returns:
      `layer_types` and `sliding_window`, which their models want as a number even where no layer slides.
    """
    return {
        "layer_types": layer_types(config.windows, config.n_layers),
        "sliding_window": max(config.windows, default=0) or config.max_len,
    }

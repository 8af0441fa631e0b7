"""SmolLM3: Llama with layers that do not rotate."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import (
    ATTENTION,
    BIASES,
    FIELDS,
    MLP,
    NORMS,
    ROOT,
    padding,
    replace_fields,
    write_rope,
)
from elastic_lm.hf.family import Family, Field, typed
from elastic_lm.hf.rope import rope_from_hf
from elastic_lm.hf.windows import layer_types, layered_windows, read_window

ROTATED = "no_rope_layers"  # 1 for the layers that do rotate, in spite of its name


def _read_rotated(hf: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    period = typed(hf, "no_rope_layer_interval", int, 4)
    require(period >= 1, "no_rope_layer_interval", period, "must be at least 1")
    rotated = hf.get(ROTATED)
    if rotated is None:
        return tuple((layer + 1) % period > 0 for layer in range(layers))
    usable = isinstance(rotated, list) and len(rotated) >= layers and all(one in (0, 1) for one in rotated)
    require(usable, ROTATED, rotated, f"must be a list of {layers} numbers, 1 for layers that rotate, else 0")
    return tuple(bool(one) for one in rotated[:layers])


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    layers = values["n_layers"]
    rotated = _read_rotated(hf, layers)
    window = read_window(hf, 0)
    window = window if typed(hf, "use_sliding_window", bool, False) else 0
    return {
        "rope": rope_from_hf(hf, values["max_len"], theta=2e6),
        "rotated": rotated,
        "windows": layered_windows(hf, layers, window, lambda layer: not rotated[layer]),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    window = max(config.windows, default=0)
    return write_rope(config) | {
        ROTATED: [int(config.rope_of(layer) is not None) for layer in range(config.n_layers)],
        "use_sliding_window": bool(window),
        "sliding_window": window or None,
        "layer_types": layer_types(config.windows, config.n_layers),
        **padding(config, 128004),
    }


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=(
        *replace_fields(
            FIELDS,
            Field("n_kv_heads", "num_key_value_heads", 4),
            Field("max_len", "max_position_embeddings", 32768),
            Field("tied", "tie_word_embeddings", True),
            Field("bos_id", "bos_token_id", 128000),
        ),
        *BIASES,
        Field("mlp_bias", "mlp_bias", False),
    ),
    fixed={},
    activation=("hidden_act", "silu"),
    eos_default=128001,
    read=_read,
    write=_write,
    ignored={"max_window_layers": None},
)

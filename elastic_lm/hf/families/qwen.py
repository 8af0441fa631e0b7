"""Qwen 2 (biases on query, key and value) and Qwen 3 (normalised query and key heads)."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import (
    ATTENTION,
    BIASES,
    FIELDS,
    MLP,
    NORMS,
    ROOT,
    read_rope,
    replace_fields,
    write_rope,
)
from elastic_lm.hf.family import Family, Field, Tensor, typed
from elastic_lm.hf.windows import layer_types, layered_windows, read_window

QWEN_FIELDS = replace_fields(
    FIELDS,
    Field("n_kv_heads", "num_key_value_heads", 32),
    Field("max_len", "max_position_embeddings", 32768),
    Field("bos_id", "bos_token_id", None),
)

QK_NORM = {
    "attn/q_norm/scale": Tensor(("self_attn.q_norm.weight",)),
    "attn/k_norm/scale": Tensor(("self_attn.k_norm.weight",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    window = read_window(hf, 4096)
    window = window if typed(hf, "use_sliding_window", bool, False) else 0
    first = typed(hf, "max_window_layers", int, 28)
    windows = layered_windows(hf, values["n_layers"], window, lambda layer: layer >= first)
    return read_rope(hf, values) | {"windows": windows}


def _write(config: ModelConfig) -> dict[str, Any]:
    kinds = layer_types(config.windows, config.n_layers)
    full = [i for i in range(config.n_layers) if not config.window(i)]
    return write_rope(config) | {
        "use_sliding_window": bool(max(config.windows, default=0)),
        "sliding_window": max(config.windows, default=0) or None,
        "max_window_layers": full[-1] + 1 if full else 0,
        "layer_types": kinds,
    }


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=QWEN_FIELDS,
    fixed={"qkv_bias": True},
    activation=("hidden_act", "silu"),
    eos_default=None,
    read=_read,
    write=_write,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | QK_NORM | MLP,
    fields=(*replace_fields(QWEN_FIELDS, Field("head_dim", "head_dim", 128)), *BIASES),
    fixed={"qk_norm": True},
    activation=("hidden_act", "silu"),
    eos_default=None,
    read=_read,
    write=_write,
)

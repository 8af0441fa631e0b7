"""Mistral: Llama with one sliding window for all layers."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import (
    ATTENTION,
    FIELDS,
    MLP,
    NORMS,
    ROOT,
    read_rope,
    replace_fields,
    write_rope,
)
from elastic_lm.hf.family import Family, Field
from elastic_lm.hf.windows import uniform_windows


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return read_rope(hf, values) | {"windows": uniform_windows(hf, values["n_layers"], 4096)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_rope(config) | {"sliding_window": config.window(0) or None}


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=replace_fields(
        FIELDS,
        Field("n_kv_heads", "num_key_value_heads", 8),
        Field("max_len", "max_position_embeddings", 131072),
    ),
    fixed={},
    activation=("hidden_act", "silu"),
    eos_default=2,
    read=_read,
    write=_write,
)

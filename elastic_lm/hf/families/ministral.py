"""Ministral (a window by layer) and Ministral 3 (queries that grow with their position): Mistral's layers."""

import dataclasses
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
from elastic_lm.hf.family import Family, Field, number
from elastic_lm.hf.rope import ORIGINAL, rope_from_hf
from elastic_lm.hf.windows import layer_types, layered_windows, read_window, uniform_windows

GROWTH = "llama_4_scaling_beta"

# What Ministral 3 takes where config.json has no rotary settings.
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    GROWTH: 0.1,
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    window = read_window(hf, 4096)
    return read_rope(hf, values) | {
        "windows": layered_windows(hf, values["n_layers"], window, lambda layer: True)
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_rope(config) | {
        "layer_types": layer_types(config.windows, config.n_layers),
        "sliding_window": max(config.windows, default=0) or None,
    }


def _read_3(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    settings = hf.get("rope_scaling") or hf.get("rope_parameters") or ROPE
    rope = rope_from_hf(hf, values["max_len"], default=ROPE, extra=(GROWTH,))
    if not rope.original_max_len:
        original = int(number(settings, ORIGINAL, values["max_len"], above=0))
        rope = dataclasses.replace(rope, original_max_len=original)
    return {
        "rope": rope,
        "query_growth": float(number(settings, GROWTH, 0.0)),
        "windows": uniform_windows(hf, values["n_layers"], 0),
    }


def _write_3(config: ModelConfig) -> dict[str, Any]:
    entries: dict[str, Any] = write_rope(config) | {"sliding_window": config.window(0) or None}
    growth = {GROWTH: config.query_growth, ORIGINAL: config.rope.original_max_len or config.max_len}
    settings = {k: entries[k] | growth for k in ("rope_parameters", "rope_scaling") if entries[k] is not None}
    return entries | settings


MINISTRAL = Family(
    model_type="ministral",
    architecture="MinistralForCausalLM",
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

MINISTRAL3 = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=replace_fields(
        FIELDS,
        Field("n_kv_heads", "num_key_value_heads", 8),
        Field("head_dim", "head_dim", 128),
        Field("max_len", "max_position_embeddings", 262144),
        Field("norm_eps", "rms_norm_eps", 1e-5),
    ),
    fixed={},
    activation=("hidden_act", "silu"),
    eos_default=2,
    read=_read_3,
    write=_write_3,
)

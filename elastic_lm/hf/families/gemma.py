"""Gemma 1: scales stored minus one, embeddings times sqrt(d), a gated MLP of tanh-GELU."""

import math
from collections.abc import Mapping
from typing import Any

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
from elastic_lm.hf.family import Family, Field


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    read = read_rope(hf, values) | {"embed_scale": math.sqrt(values["d_model"])}
    # The first releases say "gelu" and mean its approximation.
    return read | ({"activation": "gelu_tanh"} if hf.get("hidden_act") == "gelu" else {})


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=(
        *replace_fields(
            FIELDS,
            Field("n_kv_heads", "num_key_value_heads", 16),
            Field("head_dim", "head_dim", 256),
            Field("max_len", "max_position_embeddings", 8192),
            Field("tied", "tie_word_embeddings", True),
            Field("bos_id", "bos_token_id", 2),
        ),
        *BIASES,
    ),
    fixed={"norm_offset": 1.0},
    activation=("hidden_act", "gelu_pytorch_tanh"),
    eos_default=1,
    read=_read,
    write=write_rope,
    refuse=(("use_bidirectional_attention", (None, False)),),
    ignored={"hidden_activation": ("gelu_pytorch_tanh",)},
)

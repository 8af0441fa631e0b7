"""Helium: Llama with neighbouring dimensions rotated, and no bias on attention's output."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.hf.families.llama import (
    ATTENTION,
    FIELDS,
    MLP,
    NORMS,
    ROOT,
    replace_fields,
    write_rope,
)
from elastic_lm.hf.family import Family, Field
from elastic_lm.hf.rope import interleaved_rope_from_hf


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = values["n_heads"], values.get("head_dim", 0)
    fits = not width or heads * width == values["d_model"]
    require(fits, "head_dim", width, f"must be hidden_size={values['d_model']} / num_attention_heads={heads}")
    return {"rope": interleaved_rope_from_hf(hf, values["max_len"], theta=1e5)}


HELIUM = Family(
    model_type="helium",
    architecture="HeliumForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=(
        *replace_fields(
            FIELDS,
            Field("n_kv_heads", "num_key_value_heads", 20),
            Field("head_dim", "head_dim", 128),
            Field("max_len", "max_position_embeddings", 4096),
            Field("norm_eps", "rms_norm_eps", 1e-8),
        ),
        Field("qkv_bias", "attention_bias", False),
        Field("mlp_bias", "mlp_bias", False),
    ),
    fixed={},
    activation=("hidden_act", "silu"),
    eos_default=2,
    read=_read,
    write=write_rope,
)

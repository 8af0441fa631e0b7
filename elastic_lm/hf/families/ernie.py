"""Ernie 4.5, dense: Llama with neighbouring dimensions rotated, and biases everywhere or nowhere."""

from collections.abc import Mapping
from typing import Any

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
    return {"rope": interleaved_rope_from_hf(hf, values["max_len"], theta=5e5)}


ERNIE = Family(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=(
        *replace_fields(
            FIELDS,
            Field("n_kv_heads", "num_key_value_heads", 2),
            Field("head_dim", "head_dim", 128),
            Field("max_len", "max_position_embeddings", 131072),
            Field("norm_eps", "rms_norm_eps", 1e-5),
            Field("tied", "tie_word_embeddings", True),
        ),
        *(Field(ours, "use_bias", False) for ours in ("qkv_bias", "out_bias", "mlp_bias")),
    ),
    fixed={},
    activation=("hidden_act", "silu"),
    eos_default=2,
    read=_read,
    write=write_rope,
)

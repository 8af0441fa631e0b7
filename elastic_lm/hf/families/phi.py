"""Phi-1, 1.5 and 2: parallel branches with one norm, partial rotation, biases also on the head."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import ATTENTION, FIELDS, replace_fields
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.rope import rope_from_hf, rope_to_hf

ROOT = {
    "embed/table": Tensor(("model.embed_tokens.weight",)),
    "final_norm/scale": Tensor(("model.final_layernorm.weight",)),
    "final_norm/bias": Tensor(("model.final_layernorm.bias",)),
    "head/kernel": Tensor(("lm_head.weight",)),
    "head/bias": Tensor(("lm_head.bias",)),
}

LAYERS = {
    "attn_norm/scale": Tensor(("input_layernorm.weight",)),
    "attn_norm/bias": Tensor(("input_layernorm.bias",)),
    "attn/qkv/kernel": ATTENTION["attn/qkv/kernel"],
    "attn/qkv/bias": ATTENTION["attn/qkv/bias"],
    "attn/out/kernel": Tensor(("self_attn.dense.weight",)),
    "attn/out/bias": Tensor(("self_attn.dense.bias",)),
    "mlp/up/kernel": Tensor(("mlp.fc1.weight",)),
    "mlp/up/bias": Tensor(("mlp.fc1.bias",)),
    "mlp/down/kernel": Tensor(("mlp.fc2.weight",)),
    "mlp/down/bias": Tensor(("mlp.fc2.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope": rope_from_hf(hf, values["max_len"], fraction=0.5)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return rope_to_hf(config.rope, config.max_len, fraction_key="partial_rotary_factor")


PHI = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=LAYERS,
    fields=replace_fields(
        tuple(field for field in FIELDS if field.ours != "head_dim"),
        Field("max_len", "max_position_embeddings", 2048),
        Field("norm_eps", "layer_norm_eps", 1e-5),
    ),
    fixed={
        "norm": "layernorm",
        "gated": False,
        "parallel_residual": True,
        "shared_norm": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    },
    activation=("hidden_act", "gelu_new"),
    eos_default=2,
    read=_read,
    write=_write,
    refuse=(("qk_layernorm", (False,)),),
)

"""Nemotron: LayerNorm with scales stored minus one, squared ReLU without a gate, partial rotation."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import ATTENTION, BIASES, FIELDS, ROOT, replace_fields
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.rope import rope_from_hf, rope_to_hf

LAYERS = {
    "attn_norm/scale": Tensor(("input_layernorm.weight",)),
    "attn_norm/bias": Tensor(("input_layernorm.bias",)),
    "mlp_norm/scale": Tensor(("post_attention_layernorm.weight",)),
    "mlp_norm/bias": Tensor(("post_attention_layernorm.bias",)),
    "mlp/up/kernel": Tensor(("mlp.up_proj.weight",)),
    "mlp/up/bias": Tensor(("mlp.up_proj.bias",)),
    "mlp/down/kernel": Tensor(("mlp.down_proj.weight",)),
    "mlp/down/bias": Tensor(("mlp.down_proj.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope": rope_from_hf(hf, values["max_len"], fraction=0.5)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return rope_to_hf(config.rope, config.max_len, fraction_key="partial_rotary_factor")


NEMOTRON = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT | {"final_norm/bias": Tensor(("model.norm.bias",))},
    layers=LAYERS | ATTENTION,
    fields=(
        *replace_fields(
            FIELDS,
            Field("max_len", "max_position_embeddings", 4096),
            Field("norm_eps", "norm_eps", 1e-5),
            Field("bos_id", "bos_token_id", 2),
        ),
        *BIASES,
        Field("mlp_bias", "mlp_bias", False),
    ),
    fixed={"norm": "layernorm", "norm_offset": 1.0, "gated": False},
    activation=("hidden_act", "relu2"),
    eos_default=3,
    read=_read,
    write=_write,
    ignored={"rope_percent": None},  # says what partial_rotary_factor says
)

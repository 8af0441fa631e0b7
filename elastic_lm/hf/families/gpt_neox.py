"""GPT-NeoX (Pythia): parallel residual, partial rotation, query, key and value fused head by head."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.layouts import HEADWISE_QKV
from elastic_lm.hf.rope import rope_from_hf, rope_to_hf

ROOT = {
    "embed/table": Tensor(("gpt_neox.embed_in.weight",)),
    "final_norm/scale": Tensor(("gpt_neox.final_layer_norm.weight",)),
    "final_norm/bias": Tensor(("gpt_neox.final_layer_norm.bias",)),
    "head/kernel": Tensor(("embed_out.weight",), alias="lm_head.weight"),
}

LAYERS = {
    "attn_norm/scale": Tensor(("input_layernorm.weight",)),
    "attn_norm/bias": Tensor(("input_layernorm.bias",)),
    "attn/qkv/kernel": Tensor(("attention.query_key_value.weight",), HEADWISE_QKV),
    "attn/qkv/bias": Tensor(("attention.query_key_value.bias",), HEADWISE_QKV),
    "attn/out/kernel": Tensor(("attention.dense.weight",)),
    "attn/out/bias": Tensor(("attention.dense.bias",)),
    "mlp_norm/scale": Tensor(("post_attention_layernorm.weight",)),
    "mlp_norm/bias": Tensor(("post_attention_layernorm.bias",)),
    "mlp/up/kernel": Tensor(("mlp.dense_h_to_4h.weight",)),
    "mlp/up/bias": Tensor(("mlp.dense_h_to_4h.bias",)),
    "mlp/down/kernel": Tensor(("mlp.dense_4h_to_h.weight",)),
    "mlp/down/bias": Tensor(("mlp.dense_4h_to_h.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    rope = rope_from_hf(
        hf, values["max_len"], theta_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25
    )
    return {"rope": rope}


def _write(config: ModelConfig) -> dict[str, Any]:
    return rope_to_hf(config.rope, config.max_len, theta_key="rotary_emb_base", fraction_key="rotary_pct")


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    layer="gpt_neox.layers.{}.",
    root=ROOT,
    layers=LAYERS,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "hidden_size"),
        Field("n_layers", "num_hidden_layers"),
        Field("n_heads", "num_attention_heads"),
        Field("d_mlp", "intermediate_size"),
        Field("max_len", "max_position_embeddings", 2048),
        Field("norm_eps", "layer_norm_eps", 1e-5),
        Field("tied", "tie_word_embeddings", False),
        Field("parallel_residual", "use_parallel_residual", True),
        Field("qkv_bias", "attention_bias", True),
        Field("out_bias", "attention_bias", True),
        Field("bos_id", "bos_token_id", 0),
    ),
    fixed={"norm": "layernorm", "gated": False, "mlp_bias": True},
    activation=("hidden_act", "gelu"),
    eos_default=2,
    read=_read,
    write=_write,
)

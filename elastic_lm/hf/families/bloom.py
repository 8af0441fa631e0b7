"""BLOOM: ALiBi instead of positions, a norm after the embedding, query, key and value fused head by head."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.layouts import HEADWISE_QKV

ROOT = {
    "embed/table": Tensor(("transformer.word_embeddings.weight",)),
    "embed_norm/scale": Tensor(("transformer.word_embeddings_layernorm.weight",)),
    "embed_norm/bias": Tensor(("transformer.word_embeddings_layernorm.bias",)),
    "final_norm/scale": Tensor(("transformer.ln_f.weight",)),
    "final_norm/bias": Tensor(("transformer.ln_f.bias",)),
    "head/kernel": Tensor(("lm_head.weight",)),
}

LAYERS = {
    "attn_norm/scale": Tensor(("input_layernorm.weight",)),
    "attn_norm/bias": Tensor(("input_layernorm.bias",)),
    "attn/qkv/kernel": Tensor(("self_attention.query_key_value.weight",), HEADWISE_QKV),
    "attn/qkv/bias": Tensor(("self_attention.query_key_value.bias",), HEADWISE_QKV),
    "attn/out/kernel": Tensor(("self_attention.dense.weight",)),
    "attn/out/bias": Tensor(("self_attention.dense.bias",)),
    "mlp_norm/scale": Tensor(("post_attention_layernorm.weight",)),
    "mlp_norm/bias": Tensor(("post_attention_layernorm.bias",)),
    "mlp/up/kernel": Tensor(("mlp.dense_h_to_4h.weight",)),
    "mlp/up/bias": Tensor(("mlp.dense_h_to_4h.bias",)),
    "mlp/down/kernel": Tensor(("mlp.dense_4h_to_h.weight",)),
    "mlp/down/bias": Tensor(("mlp.dense_4h_to_h.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {"d_mlp": 4 * values["d_model"]}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {}


BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    prefix="transformer.",
    layer="transformer.h.{}.",
    root=ROOT,
    layers=LAYERS,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "hidden_size", alias="n_embed"),
        Field("n_layers", "n_layer", alias="num_hidden_layers"),
        Field("n_heads", "n_head", alias="num_attention_heads"),
        Field("max_len", "seq_length", 2048),  # the length of training; nothing ends there
        Field("norm_eps", "layer_norm_epsilon", 1e-5),
        Field("tied", "tie_word_embeddings", True),
        Field("bos_id", "bos_token_id", 1),
    ),
    fixed={
        "norm": "layernorm",
        "gated": False,
        "position": "alibi",
        "embed_norm": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    activation=("hidden_act", "gelu_new"),
    eos_default=2,
    read=_read,
    write=_write,
    refuse=(
        ("apply_residual_connection_post_layernorm", (False,)),
        ("hidden_act", ("gelu_new",)),  # which it always is; only an export of ours says so
    ),
    ignored={
        "bias_dropout_fusion": None,
        "masked_softmax_fusion": None,
        "offset_alibi": None,
        "skip_bias_add": None,
        "skip_bias_add_qkv": None,
    },
)

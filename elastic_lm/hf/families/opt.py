"""OPT: learned positions behind two rows that are not positions, ReLU, biases."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.layouts import QKV

OFFSET = 2  # rows of the table of positions before that of the first one; padding reads one of them

ROOT = {
    "embed/table": Tensor(("model.decoder.embed_tokens.weight",)),
    "positions/table": Tensor(("model.decoder.embed_positions.weight",)),
    "final_norm/scale": Tensor(("model.decoder.final_layer_norm.weight",)),
    "final_norm/bias": Tensor(("model.decoder.final_layer_norm.bias",)),
    "head/kernel": Tensor(("lm_head.weight",)),
}

LAYERS = {
    "attn_norm/scale": Tensor(("self_attn_layer_norm.weight",)),
    "attn_norm/bias": Tensor(("self_attn_layer_norm.bias",)),
    "attn/qkv/kernel": Tensor(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), QKV
    ),
    "attn/qkv/bias": Tensor(("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), QKV),
    "attn/out/kernel": Tensor(("self_attn.out_proj.weight",)),
    "attn/out/bias": Tensor(("self_attn.out_proj.bias",)),
    "mlp_norm/scale": Tensor(("final_layer_norm.weight",)),
    "mlp_norm/bias": Tensor(("final_layer_norm.bias",)),
    "mlp/up/kernel": Tensor(("fc1.weight",)),
    "mlp/up/bias": Tensor(("fc1.bias",)),
    "mlp/down/kernel": Tensor(("fc2.weight",)),
    "mlp/down/bias": Tensor(("fc2.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    width = hf.get("word_embed_proj_dim")
    require(
        width in (None, values["d_model"]),
        "word_embed_proj_dim",
        width,
        f"embeddings of another width than hidden_size={values['d_model']} (OPT-350M) are not supported",
    )
    return {}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"word_embed_proj_dim": config.d_model}


OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    prefix="model.",
    layer="model.decoder.layers.{}.",
    root=ROOT,
    layers=LAYERS,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "hidden_size"),
        Field("n_layers", "num_hidden_layers"),
        Field("n_heads", "num_attention_heads"),
        Field("d_mlp", "ffn_dim"),
        Field("max_len", "max_position_embeddings", 2048),
        Field("tied", "tie_word_embeddings", True),
        Field("qkv_bias", "enable_bias", True),
        Field("out_bias", "enable_bias", True),
        Field("mlp_bias", "enable_bias", True),
        Field("bos_id", "bos_token_id", 2),
    ),
    fixed={"norm": "layernorm", "gated": False, "position": "learned", "position_offset": OFFSET},
    activation=("activation_function", "relu"),
    eos_default=2,
    read=_read,
    write=_write,
    refuse=(
        ("do_layer_norm_before", (True,)),  # OPT-350M normalises after attention and MLP
        ("_remove_final_layer_norm", (False,)),
        ("layer_norm_elementwise_affine", (True,)),
    ),
    ignored={"output_projection": None},
)

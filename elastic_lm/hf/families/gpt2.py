"""GPT-2: learned positions, LayerNorm with biases, kernels stored transposed (Conv1D)."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.family import Family, Field, Tensor, typed
from elastic_lm.hf.layouts import CONV_QKV, TRANSPOSED

ROOT = {
    "embed/table": Tensor(("transformer.wte.weight",)),
    "positions/table": Tensor(("transformer.wpe.weight",)),
    "final_norm/scale": Tensor(("transformer.ln_f.weight",)),
    "final_norm/bias": Tensor(("transformer.ln_f.bias",)),
    "head/kernel": Tensor(("lm_head.weight",)),
}

LAYERS = {
    "attn_norm/scale": Tensor(("ln_1.weight",)),
    "attn_norm/bias": Tensor(("ln_1.bias",)),
    "attn/qkv/kernel": Tensor(("attn.c_attn.weight",), CONV_QKV),
    "attn/qkv/bias": Tensor(("attn.c_attn.bias",), CONV_QKV),
    "attn/out/kernel": Tensor(("attn.c_proj.weight",), TRANSPOSED),
    "attn/out/bias": Tensor(("attn.c_proj.bias",)),
    "mlp_norm/scale": Tensor(("ln_2.weight",)),
    "mlp_norm/bias": Tensor(("ln_2.bias",)),
    "mlp/up/kernel": Tensor(("mlp.c_fc.weight",), TRANSPOSED),
    "mlp/up/bias": Tensor(("mlp.c_fc.bias",)),
    "mlp/down/kernel": Tensor(("mlp.c_proj.weight",), TRANSPOSED),
    "mlp/down/bias": Tensor(("mlp.c_proj.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "d_mlp": typed(hf, "n_inner", int, None) or 4 * values["d_model"],
        "attn_scale": 0.0 if typed(hf, "scale_attn_weights", bool, True) else 1.0,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"n_inner": config.d_mlp, "scale_attn_weights": config.query_scale != 1.0}


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    layer="transformer.h.{}.",
    root=ROOT,
    layers=LAYERS,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "n_embd"),
        Field("n_layers", "n_layer"),
        Field("n_heads", "n_head"),
        Field("max_len", "n_positions", 1024),
        Field("norm_eps", "layer_norm_epsilon", 1e-5),
        Field("tied", "tie_word_embeddings", True),
        Field("bos_id", "bos_token_id", 50256),
    ),
    fixed={
        "norm": "layernorm",
        "gated": False,
        "position": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    activation=("activation_function", "gelu_new"),
    eos_default=50256,
    read=_read,
    write=_write,
    refuse=(("scale_attn_by_inverse_layer_idx", (False,)), ("add_cross_attention", (False,))),
)

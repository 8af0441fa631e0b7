"""StarCoder 2: heads and rotation as in Llama, LayerNorm, an MLP without a gate, biases, one window."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import ATTENTION, FIELDS, ROOT, read_rope, replace_fields, write_rope
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.windows import uniform_windows

LAYERS = {
    "attn_norm/scale": Tensor(("input_layernorm.weight",)),
    "attn_norm/bias": Tensor(("input_layernorm.bias",)),
    "mlp_norm/scale": Tensor(("post_attention_layernorm.weight",)),
    "mlp_norm/bias": Tensor(("post_attention_layernorm.bias",)),
    "mlp/up/kernel": Tensor(("mlp.c_fc.weight",)),
    "mlp/up/bias": Tensor(("mlp.c_fc.bias",)),
    "mlp/down/kernel": Tensor(("mlp.c_proj.weight",)),
    "mlp/down/bias": Tensor(("mlp.c_proj.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return read_rope(hf, values) | {"windows": uniform_windows(hf, values["n_layers"], 0)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_rope(config) | {"sliding_window": config.window(0) or None}


STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT | {"final_norm/bias": Tensor(("model.norm.bias",))},
    layers=LAYERS | ATTENTION,
    fields=(
        *replace_fields(
            tuple(field for field in FIELDS if field.ours != "head_dim"),
            Field("n_kv_heads", "num_key_value_heads", 2),
            Field("max_len", "max_position_embeddings", 4096),
            Field("norm_eps", "norm_epsilon", 1e-5),
            Field("tied", "tie_word_embeddings", True),
            Field("bos_id", "bos_token_id", 50256),
        ),
        Field("qkv_bias", "use_bias", True),
        Field("out_bias", "use_bias", True),
        Field("mlp_bias", "use_bias", True),
    ),
    fixed={"norm": "layernorm", "gated": False},
    activation=("hidden_act", "gelu_pytorch_tanh"),
    eos_default=50256,
    read=_read,
    write=_write,
    ignored={
        "activation_function": None,
        "layer_norm_epsilon": None,
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
        "scale_attn_weights": (True,),
    },
)

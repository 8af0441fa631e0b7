"""Gemma 2: norms around attention and MLP, scales stored minus one, softcaps, alternating windows."""

import math
from collections.abc import Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import (
    ATTENTION,
    BIASES,
    FIELDS,
    MLP,
    ROOT,
    read_rope,
    replace_fields,
    write_rope,
)
from elastic_lm.hf.family import Family, Field, Tensor, number, typed
from elastic_lm.hf.windows import layered_windows, read_window, write_layered_windows

NORMS = {
    "attn_norm/scale": Tensor(("input_layernorm.weight",)),
    "post_attn_norm/scale": Tensor(("post_attention_layernorm.weight",)),
    "mlp_norm/scale": Tensor(("pre_feedforward_layernorm.weight",)),
    "post_mlp_norm/scale": Tensor(("post_feedforward_layernorm.weight",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    window = read_window(hf, 4096)
    again = typed(hf, "sliding_window_size", int, window)
    require(again == window, "sliding_window_size", again, f"must be sliding_window={window}, or left out")
    return read_rope(hf, values) | {
        "windows": layered_windows(hf, values["n_layers"], window, lambda layer: layer % 2 == 0),
        "attn_scale": 1.0 / math.sqrt(number(hf, "query_pre_attn_scalar", 256, above=0)),
        "embed_scale": math.sqrt(values["d_model"]),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_rope(config) | {
        **write_layered_windows(config),
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "hidden_act": "gelu_pytorch_tanh",
    }


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=(
        *replace_fields(
            FIELDS,
            Field("n_kv_heads", "num_key_value_heads", 4),
            Field("head_dim", "head_dim", 256),
            Field("max_len", "max_position_embeddings", 8192),
            Field("tied", "tie_word_embeddings", True),
            Field("bos_id", "bos_token_id", 2),
        ),
        *BIASES,
        Field("attn_softcap", "attn_logit_softcapping", 50.0, off=0.0),
        Field("final_softcap", "final_logit_softcapping", 30.0, off=0.0),
    ),
    fixed={"norm_offset": 1.0, "sandwich_norm": True},
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    eos_default=1,
    read=_read,
    write=_write,
    refuse=(("use_bidirectional_attention", (None, False)),),
    ignored={"hidden_act": None},
)

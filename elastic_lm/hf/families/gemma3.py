"""Gemma 3, text: Gemma 2's layers with normalised heads, and local layers that rotate by a base of their own.

A folder of images and text (`model_type` gemma3) holds the same model under `text_config`, and under other
names of tensors; its text part is read.
"""

import math
from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.gemma2 import NORMS
from elastic_lm.hf.families.llama import ATTENTION, BIASES, FIELDS, MLP, ROOT, replace_fields
from elastic_lm.hf.families.qwen import QK_NORM
from elastic_lm.hf.family import Family, Field, number
from elastic_lm.hf.rope import layered_ropes, layered_ropes_to_hf
from elastic_lm.hf.windows import layered_windows, read_pattern, read_window, write_layered_windows

LOCAL_THETA = "rope_local_base_freq"


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    window, period = read_window(hf, 4096), read_pattern(hf, 6)
    ropes = layered_ropes(hf, values["max_len"], theta=1e6, local_theta=1e4, local_key=LOCAL_THETA)
    return ropes | {
        "windows": layered_windows(hf, values["n_layers"], window, lambda layer: (layer + 1) % period > 0),
        "attn_scale": 1.0 / math.sqrt(number(hf, "query_pre_attn_scalar", 256, above=0)),
        "embed_scale": math.sqrt(values["d_model"]),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return layered_ropes_to_hf(config, LOCAL_THETA) | {
        **write_layered_windows(config),
        "query_pre_attn_scalar": round(config.query_scale**-2),
    }


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | QK_NORM | MLP,
    fields=(
        *replace_fields(
            FIELDS,
            # Files of images and text leave out what is as in transformers' config of the text.
            Field("vocab_size", "vocab_size", 262208),
            Field("d_model", "hidden_size", 2304),
            Field("n_layers", "num_hidden_layers", 26),
            Field("n_heads", "num_attention_heads", 8),
            Field("d_mlp", "intermediate_size", 9216),
            Field("n_kv_heads", "num_key_value_heads", 4),
            Field("head_dim", "head_dim", 256),
            Field("max_len", "max_position_embeddings", 131072),
            Field("tied", "tie_word_embeddings", True),
            Field("bos_id", "bos_token_id", 2),
        ),
        *BIASES,
        Field("final_softcap", "final_logit_softcapping", None, off=0.0),
    ),
    fixed={"norm_offset": 1.0, "sandwich_norm": True, "qk_norm": True},
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    eos_default=1,
    read=_read,
    write=_write,
    refuse=(("use_bidirectional_attention", (None, False)), ("attn_logit_softcapping", (None,))),
    ignored={"hidden_act": None},
)

"""Cohere (Command R) and Cohere 2: parallel branches with one norm without a bias, neighbours rotated.

Cohere 2 has windows, and rotates only in the layers that have them.
"""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import (
    ATTENTION,
    BIASES,
    FIELDS,
    MLP,
    ROOT,
    replace_fields,
    write_rope,
)
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.rope import interleaved_rope_from_hf
from elastic_lm.hf.windows import layered_windows, read_pattern, read_window, write_layered_windows

NORMS = {"attn_norm/scale": Tensor(("input_layernorm.weight",))}

COHERE_FIELDS = (
    *replace_fields(
        FIELDS,
        Field("max_len", "max_position_embeddings", 8192),
        Field("norm_eps", "layer_norm_eps", 1e-5),
        Field("tied", "tie_word_embeddings", True),
        Field("bos_id", "bos_token_id", 5),
    ),
    *BIASES,
    Field("logit_scale", "logit_scale", 0.0625),
)

FIXED = {"norm": "layernorm", "norm_bias": False, "parallel_residual": True, "shared_norm": True}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope": interleaved_rope_from_hf(hf, values["max_len"], theta=5e5)}


def _read_2(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    window, period = read_window(hf, 4096), read_pattern(hf, 4)
    windows = layered_windows(hf, values["n_layers"], window, lambda layer: (layer + 1) % period > 0)
    return {
        "rope": interleaved_rope_from_hf(hf, values["max_len"], theta=1e4),
        "windows": windows,
        "rotated": tuple(bool(window) for window in windows or (0,) * values["n_layers"]),
    }


def _write_2(config: ModelConfig) -> dict[str, Any]:
    return write_rope(config) | write_layered_windows(config)


COHERE = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=COHERE_FIELDS,
    fixed=FIXED,
    activation=("hidden_act", "silu"),
    eos_default=255001,
    read=_read,
    write=write_rope,
    refuse=(("use_qk_norm", (False, None)),),
)

COHERE2 = Family(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=tuple(field for field in COHERE_FIELDS if field.ours != "head_dim"),
    fixed=FIXED,
    activation=("hidden_act", "silu"),
    eos_default=255001,
    read=_read_2,
    write=_write_2,
    ignored={
        "head_dim": None,  # theirs is hidden_size / num_attention_heads, whatever the file says
        "layer_switch": None,
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
        "use_parallel_embedding": None,
    },
)

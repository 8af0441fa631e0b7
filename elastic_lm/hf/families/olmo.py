"""OLMo 2 and 3: norms after attention and MLP alone, all heads of a token normalised at once.

OLMo 3 has windows, and stretches the rotation of the other layers alone.
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
    read_rope,
    replace_fields,
    write_rope,
)
from elastic_lm.hf.families.qwen import QK_NORM
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.rope import layered_ropes, layered_ropes_to_hf
from elastic_lm.hf.windows import layered_windows, read_window, write_layered_windows

NORMS = {
    "post_attn_norm/scale": Tensor(("post_attention_layernorm.weight",)),
    "post_mlp_norm/scale": Tensor(("post_feedforward_layernorm.weight",)),
}

OLMO_FIELDS = (
    *replace_fields(
        FIELDS,
        Field("norm_eps", "rms_norm_eps", 1e-5),
        Field("bos_id", "bos_token_id", None),
    ),
    *BIASES,
)

FIXED = {"pre_norm": False, "sandwich_norm": True, "qk_norm": True, "qk_norm_whole": True}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    window = read_window(hf, 4096)
    return {
        **layered_ropes(hf, values["max_len"], theta=5e5, local_theta=5e5),
        "windows": layered_windows(hf, values["n_layers"], window, lambda layer: (layer + 1) % 4 > 0),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return layered_ropes_to_hf(config) | write_layered_windows(config)


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | QK_NORM | MLP,
    fields=OLMO_FIELDS,
    fixed=FIXED,
    activation=("hidden_act", "silu"),
    eos_default=50279,
    read=read_rope,
    write=write_rope,
)

OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | QK_NORM | MLP,
    fields=OLMO_FIELDS,
    fixed=FIXED,
    activation=("hidden_act", "silu"),
    eos_default=50279,
    read=_read,
    write=_write,
)

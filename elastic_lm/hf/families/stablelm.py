"""StableLM: LayerNorm around a gated MLP, partial rotation; branches may be parallel, with one norm."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import ATTENTION, FIELDS, MLP, NORMS, ROOT, replace_fields
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.rope import rope_from_hf, rope_to_hf

BIASES = {
    "attn_norm/bias": Tensor(("input_layernorm.bias",)),
    "mlp_norm/bias": Tensor(("post_attention_layernorm.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope": rope_from_hf(hf, values["max_len"], fraction=0.25)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return rope_to_hf(config.rope, config.max_len, fraction_key="partial_rotary_factor")


STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT | {"final_norm/bias": Tensor(("model.norm.bias",))},
    layers=NORMS | BIASES | ATTENTION | MLP,
    fields=(
        *replace_fields(
            tuple(field for field in FIELDS if field.ours != "head_dim"),
            Field("n_kv_heads", "num_key_value_heads", 32),
            Field("max_len", "max_position_embeddings", 4096),
            Field("norm_eps", "layer_norm_eps", 1e-5),
            Field("bos_id", "bos_token_id", 0),
        ),
        Field("qkv_bias", "use_qkv_bias", False),
        Field("parallel_residual", "use_parallel_residual", False),
        Field("shared_norm", "use_parallel_residual", False),
    ),
    fixed={"norm": "layernorm"},
    activation=("hidden_act", "silu"),
    eos_default=0,
    read=_read,
    write=_write,
    refuse=(("qk_layernorm", (False,)),),  # a LayerNorm with scales of its own in every head
)

"""Llama 1, 2 and 3, and what their relatives Mistral and Qwen share with them."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.layouts import GATE_UP, QKV
from elastic_lm.hf.rope import rope_from_hf, rope_to_hf

ROOT = {
    "embed/table": Tensor(("model.embed_tokens.weight",)),
    "final_norm/scale": Tensor(("model.norm.weight",)),
    "head/kernel": Tensor(("lm_head.weight",)),
}

ATTENTION = {
    "attn/qkv/kernel": Tensor(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), QKV
    ),
    "attn/qkv/bias": Tensor(("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), QKV),
    "attn/out/kernel": Tensor(("self_attn.o_proj.weight",)),
    "attn/out/bias": Tensor(("self_attn.o_proj.bias",)),
}

MLP = {
    "mlp/up/kernel": Tensor(("mlp.gate_proj.weight", "mlp.up_proj.weight"), GATE_UP),
    "mlp/up/bias": Tensor(("mlp.gate_proj.bias", "mlp.up_proj.bias"), GATE_UP),
    "mlp/down/kernel": Tensor(("mlp.down_proj.weight",)),
    "mlp/down/bias": Tensor(("mlp.down_proj.bias",)),
}

NORMS = {
    "attn_norm/scale": Tensor(("input_layernorm.weight",)),
    "mlp_norm/scale": Tensor(("post_attention_layernorm.weight",)),
}

FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("d_model", "hidden_size"),
    Field("n_layers", "num_hidden_layers"),
    Field("n_heads", "num_attention_heads"),
    Field("n_kv_heads", "num_key_value_heads", None),
    Field("head_dim", "head_dim", None),
    Field("d_mlp", "intermediate_size"),
    Field("max_len", "max_position_embeddings", 2048),
    Field("norm_eps", "rms_norm_eps", 1e-6),
    Field("tied", "tie_word_embeddings", False),
    Field("bos_id", "bos_token_id", 1),
)

BIASES = (
    Field("qkv_bias", "attention_bias", False),
    Field("out_bias", "attention_bias", False),
)


def replace_fields(fields: tuple[Field, ...], *changed: Field) -> tuple[Field, ...]:
    """Some entries of a family's table exchanged for a relative's.

    Args:
      fields: the table.
      *changed: take the places of those with the same `ours`; others are left out.

    Returns:
      The new table, in the same order.
    """
    by_name = {field.ours: field for field in changed}
    return tuple(by_name.get(field.ours, field) for field in fields)


def padding(config: ModelConfig, default: int) -> dict[str, Any]:
    """A config.json's word that no token pads, where transformers would take one outside the vocabulary.

    Args:
      config: the model.
      default: the token that pads where config.json does not say.
    """
    return {} if default < config.vocab_size else {"pad_token_id": None}


def read_rope(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings of a family that rotates whole heads.

    Args:
      hf: parsed config.json.
      values: ModelConfig fields read so far; `max_len` among them.

    Returns:
      {"rope": RopeConfig}.

    Raises:
      ValueError: the file asks for a partial rotation.
    """
    rope = rope_from_hf(hf, values["max_len"])
    if rope.fraction != 1.0:
        raise ValueError(
            f"partial_rotary_factor={rope.fraction}: model_type {hf.get('model_type')!r} rotates whole "
            "heads; remove the key if it changes nothing"
        )
    return {"rope": rope}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Inverse of `read_rope`."""
    return rope_to_hf(config.rope, config.max_len)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=(*FIELDS, *BIASES, Field("mlp_bias", "mlp_bias", False)),
    fixed={},
    activation=("hidden_act", "silu"),
    eos_default=2,
    read=read_rope,
    write=write_rope,
)

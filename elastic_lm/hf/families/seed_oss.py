"""Seed-OSS: Llama with biases on queries, keys and values."""

from elastic_lm.hf.families.llama import (
    ATTENTION,
    FIELDS,
    MLP,
    NORMS,
    ROOT,
    read_rope,
    replace_fields,
    write_rope,
)
from elastic_lm.hf.family import Family, Field

SEED_OSS = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=(
        *replace_fields(
            FIELDS,
            Field("n_kv_heads", "num_key_value_heads", 8),
            Field("head_dim", "head_dim", 128),
            Field("max_len", "max_position_embeddings", 524288),
            Field("bos_id", "bos_token_id", 0),
        ),
        Field("qkv_bias", "attention_bias", True),
        Field("out_bias", "attention_out_bias", False),
        Field("mlp_bias", "mlp_bias", False),
    ),
    fixed={},
    activation=("hidden_act", "silu"),
    eos_default=2,
    read=read_rope,
    write=write_rope,
)

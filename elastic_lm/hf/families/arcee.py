"""Arcee (AFM): Llama with a plain MLP of squared ReLU."""

from elastic_lm.hf.families.llama import (
    ATTENTION,
    BIASES,
    FIELDS,
    NORMS,
    ROOT,
    read_rope,
    replace_fields,
    write_rope,
)
from elastic_lm.hf.family import Family, Field, Tensor

MLP = {
    "mlp/up/kernel": Tensor(("mlp.up_proj.weight",)),
    "mlp/up/bias": Tensor(("mlp.up_proj.bias",)),
    "mlp/down/kernel": Tensor(("mlp.down_proj.weight",)),
    "mlp/down/bias": Tensor(("mlp.down_proj.bias",)),
}

ARCEE = Family(
    model_type="arcee",
    architecture="ArceeForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=(
        *replace_fields(
            FIELDS,
            Field("max_len", "max_position_embeddings", 4096),
            Field("norm_eps", "rms_norm_eps", 1e-5),
            Field("bos_id", "bos_token_id", 128000),
        ),
        *BIASES,
        Field("mlp_bias", "mlp_bias", False),
    ),
    fixed={"gated": False},
    activation=("hidden_act", "relu2"),
    eos_default=128001,
    read=read_rope,
    write=write_rope,
)

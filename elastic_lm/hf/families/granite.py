"""Granite 3, dense: Llama whose embeddings, attention logits, residual sums and logits are multiplied."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import (
    ATTENTION,
    BIASES,
    FIELDS,
    MLP,
    NORMS,
    ROOT,
    read_rope,
    write_rope,
)
from elastic_lm.hf.family import Family, Field, number


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return read_rope(hf, values) | {
        "attn_scale": float(number(hf, "attention_multiplier", 1.0, above=0)),
        "logit_scale": 1.0 / number(hf, "logits_scaling", 1.0, above=0),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_rope(config) | {
        "attention_multiplier": config.query_scale,
        "logits_scaling": _divisor(config.logit_scale),
    }


def _divisor(scale: float) -> float:
    """The number whose inverse is `scale`; a short one, as checkpoints have them, where there is one."""
    short = round(1.0 / scale, 6)
    return short if short and 1.0 / short == scale else 1.0 / scale


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | ATTENTION | MLP,
    fields=(
        *FIELDS,
        *BIASES,
        Field("mlp_bias", "mlp_bias", False),
        Field("embed_scale", "embedding_multiplier", 1.0),
        Field("residual_scale", "residual_multiplier", 1.0),
    ),
    fixed={},
    activation=("hidden_act", "silu"),
    eos_default=2,
    read=_read,
    write=_write,
)

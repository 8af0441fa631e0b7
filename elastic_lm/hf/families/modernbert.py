"""ModernBERT: norms in front, rotary positions, local layers, gated MLPs, no biases."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.hf.families.bert import FIELDS
from elastic_lm.hf.families.llama import replace_fields
from elastic_lm.hf.family import Family, Field, Tensor, number, typed
from elastic_lm.hf.heads import REFUSE, read_heads, write_heads
from elastic_lm.hf.layouts import FUSED_GATE_UP, FUSED_QKV

ROOT = {
    "embed/table": Tensor(("model.embeddings.tok_embeddings.weight",)),
    "embed_norm/scale": Tensor(("model.embeddings.norm.weight",)),
    "final_norm/scale": Tensor(("model.final_norm.weight",)),
    "pooler/kernel": Tensor(("head.dense.weight",)),
    "pooler/norm/scale": Tensor(("head.norm.weight",)),
    "head/kernel": Tensor(("classifier.weight",)),
    "head/bias": Tensor(("classifier.bias",)),
    "token_head/bias": Tensor(("decoder.bias",)),
}
LAYERS = {
    "attn_norm/scale": Tensor(("attn_norm.weight",)),
    "attn/qkv/kernel": Tensor(("attn.Wqkv.weight",), FUSED_QKV),
    "attn/out/kernel": Tensor(("attn.Wo.weight",)),
    "mlp_norm/scale": Tensor(("mlp_norm.weight",)),
    "mlp/up/kernel": Tensor(("mlp.Wi.weight",), FUSED_GATE_UP),
    "mlp/down/kernel": Tensor(("mlp.Wo.weight",)),
}
POOLINGS = {"first": "cls", "mean": "mean"}
GLOBAL, LOCAL = "full_attention", "sliding_attention"
BESIDE_A_CLASSIFIER = (
    "elastic.token_head."  # transformers calls both heads `head`, and has no class with both
)


def _varying(config: EncoderConfig) -> dict[str, Tensor]:
    head = BESIDE_A_CLASSIFIER if config.n_labels else "head."
    return {
        "token_head/dense/kernel": Tensor((head + "dense.weight",)),
        "token_head/norm/scale": Tensor((head + "norm.weight",)),
    }


def _complete(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    return dataclasses.replace(config, mlm=config.mlm or BESIDE_A_CLASSIFIER + "dense.weight" in names)


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    pooling = hf.get("classifier_pooling") or "cls"
    require(pooling in POOLINGS.values(), "classifier_pooling", pooling, "must be cls or mean")
    every = _global_every(hf, values["n_layers"])
    return {
        "global_every": every,
        "window": 0 if every == 1 else typed(hf, "local_attention", int, 128),
        "rope_theta": _theta(hf, GLOBAL, "global_rope_theta", 160000.0),
        "local_rope_theta": _theta(hf, LOCAL, "local_rope_theta", 10000.0),
        "pooling": next(ours for ours, theirs in POOLINGS.items() if theirs == pooling),
        **read_heads(hf, "ModernBert", pooler="gelu", base_pooler="none"),
    }


def _global_every(hf: Mapping[str, Any], n_layers: int) -> int:
    """n of layers 0, n, 2n, ... that see everything."""
    every, kinds = typed(hf, "global_attn_every_n_layers", int, 3), hf.get("layer_types")
    require(every >= 1, "global_attn_every_n_layers", every, "must be at least 1")
    if kinds is None:
        return every
    for n in (every, *range(1, n_layers + 1)):
        if kinds == [LOCAL if i % n else GLOBAL for i in range(n_layers)]:
            return n
    fix = f"must be {GLOBAL} at every n-th layer from the first on, and {LOCAL} elsewhere"
    raise ValueError(f"layer_types={kinds!r}: {fix}")


def _theta(hf: Mapping[str, Any], kind: str, key: str, default: float) -> float:
    """Base of the wavelengths, in the style of transformers 5 or 4."""
    rope = typed(hf, "rope_parameters", dict, {}).get(kind) or {}
    require(isinstance(rope, Mapping), f"rope_parameters.{kind}", rope, "must be a mapping")
    scaling = rope.get("rope_type", "default")
    require(scaling == "default", f"rope_parameters.{kind}.rope_type", scaling, "must be default")
    old = {"rope_theta": hf.get(key)}
    found = old if rope.get("rope_theta") is None else rope
    return float(number(found, "rope_theta", default, above=0))


def _write(config: EncoderConfig) -> dict[str, Any]:
    return {
        "global_attn_every_n_layers": config.global_every if config.window else 1,
        "local_attention": config.window or 128,
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": config.local_rope_theta,
        "classifier_pooling": POOLINGS[config.pooling],
        **write_heads(config, "ModernBert"),
    }


MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBertModel",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=LAYERS,
    fields=tuple(
        field
        for field in replace_fields(
            FIELDS,
            Field("max_len", "max_position_embeddings", 8192),
            Field("norm_eps", "norm_eps", 1e-5),
            Field("pad_id", "pad_token_id", 50283),
        )
        if field.ours != "type_vocab_size"
    ),
    fixed={
        "type_vocab_size": 0,
        "positions": "rope",
        "pre_norm": True,
        "biases": False,
        "gated": True,
        "pooler_norm": True,
    },
    activation=("hidden_activation", "gelu"),
    eos_default=None,
    read=_read,
    write=_write,
    refuse=(
        *REFUSE,
        *((key, (False, None)) for key in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")),
        ("decoder_bias", (True, None)),
        ("hidden_activation", ("gelu", None)),  # also what its vocabulary head has
        ("classifier_activation", ("gelu", None)),
        ("rope_scaling", (None,)),
    ),
    # The window is read where a layer has one.
    ignored=dict.fromkeys(
        ("layer_norm_eps", "local_attention", "reference_compile", "repad_logits_with_grad")
    ),
    config_class=EncoderConfig,
    varying=_varying,
    complete=_complete,
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
)

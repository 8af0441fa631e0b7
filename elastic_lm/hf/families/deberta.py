"""DeBERTa v2 and v3 (`model_type` deberta-v2): disentangled attention, and in v2 XL a convolution.

Supported is the form that all published checkpoints have: positions shared with contents
(`share_att_key`), and both of `c2p` and `p2c`.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.hf.families.bert import EMBEDDINGS, FIELDS, HEADS, LAYERS, prefixed
from elastic_lm.hf.families.llama import replace_fields
from elastic_lm.hf.family import Family, Field, Tensor, typed
from elastic_lm.hf.heads import REFUSE, read_heads, write_heads
from elastic_lm.hf.layouts import QKV, Layout, Shape
from elastic_lm.models.registry import Config


def _conv_shapes(config: Config, shape: Shape) -> list[Shape]:
    outputs, columns = shape
    return [(outputs, config.d_model, columns // config.d_model)]


def _join_conv(tensors: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    return np.moveaxis(tensors[0], 2, 1).reshape(shape)


def _split_conv(config: Config, leaf: np.ndarray) -> list[np.ndarray]:
    return [np.moveaxis(leaf.reshape(leaf.shape[0], -1, config.d_model), 1, 2)]


# [D, K D] stored as a convolution's [D, D, K].
CONVOLUTION = Layout(_conv_shapes, _join_conv, _split_conv)

ROOT = prefixed("deberta.", EMBEDDINGS) | {
    **{path: tensor for path, tensor in HEADS.items() if not path.startswith("pooler")},
    "distances/table": Tensor(("deberta.encoder.rel_embeddings.weight",)),
    "distance_norm/scale": Tensor(("deberta.encoder.LayerNorm.weight",)),
    "distance_norm/bias": Tensor(("deberta.encoder.LayerNorm.bias",)),
    "convolution/conv/kernel": Tensor(("deberta.encoder.conv.conv.weight",), CONVOLUTION),
    "convolution/conv/bias": Tensor(("deberta.encoder.conv.conv.bias",)),
    "convolution/norm/scale": Tensor(("deberta.encoder.conv.LayerNorm.weight",)),
    "convolution/norm/bias": Tensor(("deberta.encoder.conv.LayerNorm.bias",)),
    "pooler/kernel": Tensor(("pooler.dense.weight",)),
    "pooler/bias": Tensor(("pooler.dense.bias",)),
}
PROJECTIONS = tuple(f"attention.self.{part}_proj" for part in ("query", "key", "value"))
ATTENTION = {
    "attn/qkv/kernel": Tensor(tuple(f"{name}.weight" for name in PROJECTIONS), QKV),
    "attn/qkv/bias": Tensor(tuple(f"{name}.bias" for name in PROJECTIONS), QKV),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    _check_attention(hf)
    width = values["d_model"]
    per_head = width // max(values["n_heads"], 1)
    sizes = {"embedding_size": width, "pooler_hidden_size": width, "attention_head_size": per_head}
    for key, due in sizes.items():
        size = typed(hf, key, int, due)
        require(size == due, key, size, f"must be {due}: other widths are not supported")

    buckets, longest = (typed(hf, key, int, -1) for key in ("position_buckets", "max_relative_positions"))
    norms = typed(hf, "norm_rel_ebd", str, "none").lower().split("|")
    learned = typed(hf, "position_biased_input", bool, True)
    heads = read_heads(hf, "DebertaV2", pooler="gelu", base_pooler="none")
    fix = "the masked language model's newer head is not supported; load the base model or a classifier"
    require(typed(hf, "legacy", bool, True) or not heads.get("mlm"), "legacy", False, fix)
    return {
        "positions": "learned" if learned else "none",
        "relative_buckets": max(buckets, 0),
        "relative_max_distance": longest if longest >= 1 else values.get("max_len", 512),
        "relative_norm": "layer_norm" in [norm.strip() for norm in norms],
        "conv_kernel": typed(hf, "conv_kernel_size", int, 0),
        "conv_activation": typed(hf, "conv_act", str, "tanh"),
        **heads,
    }


def _check_attention(hf: Mapping[str, Any]) -> None:
    """Refuses attention of another form; missing keys mean what they mean to transformers."""
    fix = "must be true: attention without vectors of distances is not supported in this family"
    require(hf.get("relative_attention") is True, "relative_attention", hf.get("relative_attention"), fix)
    fix = "must be true: positions with projections of their own are not supported"
    require(hf.get("share_att_key") is True, "share_att_key", hf.get("share_att_key"), fix)
    kinds = hf.get("pos_att_type")
    parts = kinds.lower().split("|") if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    right = sorted(str(part).strip() for part in parts) == ["c2p", "p2c"]
    require(right, "pos_att_type", kinds, "must be p2c|c2p: attention with one of them is not supported")


def _write(config: EncoderConfig) -> dict[str, Any]:
    entries = {
        "relative_attention": True,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": config.positions == "learned",
        "position_buckets": config.relative_buckets or -1,
        "max_relative_positions": config.relative_max_distance,
        "norm_rel_ebd": "layer_norm" if config.relative_norm else "none",
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": config.d_model,
    }
    if config.conv_kernel:
        entries |= {"conv_kernel_size": config.conv_kernel, "conv_act": config.conv_activation}
    return entries | write_heads(config, "DebertaV2")


def _complete(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    mlm = config.mlm or "cls.predictions.transform.dense.weight" in names
    return dataclasses.replace(config, mlm=mlm)


DEBERTA_V2 = Family(
    model_type="deberta-v2",
    architecture="DebertaV2Model",
    prefix="deberta.",
    layer="deberta.encoder.layer.{}.",
    root=ROOT,
    layers=LAYERS | ATTENTION,
    fields=replace_fields(
        FIELDS, Field("norm_eps", "layer_norm_eps", 1e-7), Field("type_vocab_size", "type_vocab_size", 0)
    ),
    fixed={"relative": "disentangled"},
    activation=("hidden_act", "gelu"),
    eos_default=None,
    read=_read,
    write=_write,
    refuse=(*REFUSE, ("pooler_hidden_act", ("gelu", None)), ("conv_groups", (1, None))),
    config_class=EncoderConfig,
    complete=_complete,
    copies={
        "cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)

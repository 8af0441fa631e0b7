"""DistilBERT: BERT without token types; only its task heads have a pooler, with a ReLU."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.hf.families.bert import EMBEDDINGS, prefixed
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.heads import REFUSE, read_heads, write_heads
from elastic_lm.hf.layouts import QKV

HEADS = {
    "pooler/kernel": Tensor(("pre_classifier.weight",)),
    "pooler/bias": Tensor(("pre_classifier.bias",)),
    "head/kernel": Tensor(("classifier.weight",)),
    "head/bias": Tensor(("classifier.bias",)),
    "token_head/dense/kernel": Tensor(("vocab_transform.weight",)),
    "token_head/dense/bias": Tensor(("vocab_transform.bias",)),
    "token_head/norm/scale": Tensor(("vocab_layer_norm.weight",)),
    "token_head/norm/bias": Tensor(("vocab_layer_norm.bias",)),
    "token_head/bias": Tensor(("vocab_projector.bias",)),
}
LAYERS = {
    "attn/qkv/kernel": Tensor(
        ("attention.q_lin.weight", "attention.k_lin.weight", "attention.v_lin.weight"), QKV
    ),
    "attn/qkv/bias": Tensor(("attention.q_lin.bias", "attention.k_lin.bias", "attention.v_lin.bias"), QKV),
    "attn/out/kernel": Tensor(("attention.out_lin.weight",)),
    "attn/out/bias": Tensor(("attention.out_lin.bias",)),
    "attn_norm/scale": Tensor(("sa_layer_norm.weight",)),
    "attn_norm/bias": Tensor(("sa_layer_norm.bias",)),
    "mlp/up/kernel": Tensor(("ffn.lin1.weight",)),
    "mlp/up/bias": Tensor(("ffn.lin1.bias",)),
    "mlp/down/kernel": Tensor(("ffn.lin2.weight",)),
    "mlp/down/bias": Tensor(("ffn.lin2.bias",)),
    "mlp_norm/scale": Tensor(("output_layer_norm.weight",)),
    "mlp_norm/bias": Tensor(("output_layer_norm.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return read_heads(hf, "DistilBert", pooler="relu", base_pooler="none")


def _write(config: EncoderConfig) -> dict[str, Any]:
    return write_heads(config, "DistilBert")


def _complete(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    return dataclasses.replace(config, mlm=config.mlm or "vocab_transform.weight" in names)


DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBertModel",
    prefix="distilbert.",
    layer="distilbert.transformer.layer.{}.",
    root=prefixed("distilbert.", EMBEDDINGS) | HEADS,
    layers=LAYERS,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "dim"),
        Field("n_layers", "n_layers"),
        Field("n_heads", "n_heads"),
        Field("d_mlp", "hidden_dim"),
        Field("max_len", "max_position_embeddings", 512),
        Field("pad_id", "pad_token_id", 0),
    ),
    fixed={"type_vocab_size": 0, "norm_eps": 1e-12},
    activation=("activation", "gelu"),
    eos_default=None,
    read=_read,
    write=_write,
    refuse=REFUSE,
    ignored={"sinusoidal_pos_embds": None},  # the table is in the weights, whatever filled it
    config_class=EncoderConfig,
    complete=_complete,
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
)

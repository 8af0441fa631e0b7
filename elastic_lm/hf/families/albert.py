"""ALBERT: one layer of BERT's form runs as often as there are layers, over narrower embeddings."""

import functools
from collections.abc import Mapping
from typing import Any

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.hf.families.bert import EMBEDDINGS, FIELDS, prefixed
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.heads import REFUSE, complete_heads, read_heads, write_heads
from elastic_lm.hf.layouts import QKV

ROOT = prefixed("albert.", EMBEDDINGS) | {
    "embed_map/kernel": Tensor(("albert.encoder.embedding_hidden_mapping_in.weight",)),
    "embed_map/bias": Tensor(("albert.encoder.embedding_hidden_mapping_in.bias",)),
    "pooler/kernel": Tensor(("albert.pooler.weight",)),
    "pooler/bias": Tensor(("albert.pooler.bias",)),
    "head/kernel": Tensor(("classifier.weight",)),
    "head/bias": Tensor(("classifier.bias",)),
    "token_head/dense/kernel": Tensor(("predictions.dense.weight",)),
    "token_head/dense/bias": Tensor(("predictions.dense.bias",)),
    "token_head/norm/scale": Tensor(("predictions.LayerNorm.weight",)),
    "token_head/norm/bias": Tensor(("predictions.LayerNorm.bias",)),
    "token_head/bias": Tensor(("predictions.bias",)),
}
LAYERS = {
    "attn/qkv/kernel": Tensor(
        ("attention.query.weight", "attention.key.weight", "attention.value.weight"), QKV
    ),
    "attn/qkv/bias": Tensor(("attention.query.bias", "attention.key.bias", "attention.value.bias"), QKV),
    "attn/out/kernel": Tensor(("attention.dense.weight",)),
    "attn/out/bias": Tensor(("attention.dense.bias",)),
    "attn_norm/scale": Tensor(("attention.LayerNorm.weight",)),
    "attn_norm/bias": Tensor(("attention.LayerNorm.bias",)),
    "mlp/up/kernel": Tensor(("ffn.weight",)),
    "mlp/up/bias": Tensor(("ffn.bias",)),
    "mlp/down/kernel": Tensor(("ffn_output.weight",)),
    "mlp/down/bias": Tensor(("ffn_output.bias",)),
    "mlp_norm/scale": Tensor(("full_layer_layer_norm.weight",)),
    "mlp_norm/bias": Tensor(("full_layer_layer_norm.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return read_heads(hf, "Albert", pooler="tanh", base_pooler="tanh")


def _write(config: EncoderConfig) -> dict[str, Any]:
    return {"num_hidden_groups": 1, "inner_group_num": 1, **write_heads(config, "Albert")}


ALBERT = Family(
    model_type="albert",
    architecture="AlbertModel",
    prefix="albert.",
    layer="albert.encoder.albert_layer_groups.0.albert_layers.0.",
    root=ROOT,
    layers=LAYERS,
    fields=(*FIELDS, Field("embed_dim", "embedding_size", 128)),
    fixed={"embed_map": True, "shared_layers": True},
    activation=("hidden_act", "gelu_new"),
    eos_default=None,
    read=_read,
    write=_write,
    # Nobody has published a model whose layers fall into several groups.
    refuse=(*REFUSE, ("num_hidden_groups", (1, None)), ("inner_group_num", (1, None))),
    # Of the first release in TensorFlow.
    ignored=dict.fromkeys(
        ("down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks", "layers_to_keep")
    ),
    config_class=EncoderConfig,
    complete=functools.partial(complete_heads, "predictions.dense.weight"),
    copies={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
)

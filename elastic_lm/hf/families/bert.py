"""BERT and its relatives of the same form: TinyBERT, MiniLM, sentence encoders (`model_type` bert)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.heads import REFUSE, complete_heads, read_heads, write_heads
from elastic_lm.hf.layouts import QKV

EMBEDDINGS = {
    "embed/table": Tensor(("embeddings.word_embeddings.weight",)),
    "positions/table": Tensor(("embeddings.position_embeddings.weight",)),
    "types/table": Tensor(("embeddings.token_type_embeddings.weight",)),
    "embed_norm/scale": Tensor(("embeddings.LayerNorm.weight",), alias="embeddings.LayerNorm.gamma"),
    "embed_norm/bias": Tensor(("embeddings.LayerNorm.bias",), alias="embeddings.LayerNorm.beta"),
}
HEADS = {
    "pooler/kernel": Tensor(("bert.pooler.dense.weight",)),
    "pooler/bias": Tensor(("bert.pooler.dense.bias",)),
    "head/kernel": Tensor(("classifier.weight",)),
    "head/bias": Tensor(("classifier.bias",)),
    "token_head/dense/kernel": Tensor(("cls.predictions.transform.dense.weight",)),
    "token_head/dense/bias": Tensor(("cls.predictions.transform.dense.bias",)),
    "token_head/norm/scale": Tensor(
        ("cls.predictions.transform.LayerNorm.weight",), alias="cls.predictions.transform.LayerNorm.gamma"
    ),
    "token_head/norm/bias": Tensor(
        ("cls.predictions.transform.LayerNorm.bias",), alias="cls.predictions.transform.LayerNorm.beta"
    ),
    "token_head/bias": Tensor(("cls.predictions.bias",)),
}
LAYERS = {
    "attn/qkv/kernel": Tensor(
        ("attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight"), QKV
    ),
    "attn/qkv/bias": Tensor(
        ("attention.self.query.bias", "attention.self.key.bias", "attention.self.value.bias"), QKV
    ),
    "attn/out/kernel": Tensor(("attention.output.dense.weight",)),
    "attn/out/bias": Tensor(("attention.output.dense.bias",)),
    "attn_norm/scale": Tensor(
        ("attention.output.LayerNorm.weight",), alias="attention.output.LayerNorm.gamma"
    ),
    "attn_norm/bias": Tensor(("attention.output.LayerNorm.bias",), alias="attention.output.LayerNorm.beta"),
    "mlp/up/kernel": Tensor(("intermediate.dense.weight",)),
    "mlp/up/bias": Tensor(("intermediate.dense.bias",)),
    "mlp/down/kernel": Tensor(("output.dense.weight",)),
    "mlp/down/bias": Tensor(("output.dense.bias",)),
    "mlp_norm/scale": Tensor(("output.LayerNorm.weight",), alias="output.LayerNorm.gamma"),
    "mlp_norm/bias": Tensor(("output.LayerNorm.bias",), alias="output.LayerNorm.beta"),
}
FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("d_model", "hidden_size"),
    Field("n_layers", "num_hidden_layers"),
    Field("n_heads", "num_attention_heads"),
    Field("d_mlp", "intermediate_size"),
    Field("max_len", "max_position_embeddings", 512),
    Field("type_vocab_size", "type_vocab_size", 2),
    Field("norm_eps", "layer_norm_eps", 1e-12),
    Field("pad_id", "pad_token_id", 0),
)


def prefixed(prefix: str, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A table whose names, aliases included, come after `prefix`."""

    def one(tensor: Tensor) -> Tensor:
        alias = tensor.alias and prefix + tensor.alias
        return dataclasses.replace(tensor, names=tuple(prefix + n for n in tensor.names), alias=alias)

    return {path: one(tensor) for path, tensor in table.items()}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return read_heads(hf, "Bert", pooler="tanh", base_pooler="tanh")


def _write(config: EncoderConfig) -> dict[str, Any]:
    return write_heads(config, "Bert")


BERT = Family(
    model_type="bert",
    architecture="BertModel",
    prefix="bert.",
    layer="bert.encoder.layer.{}.",
    root=prefixed("bert.", EMBEDDINGS) | HEADS,
    layers=LAYERS,
    fields=FIELDS,
    fixed={},
    activation=("hidden_act", "gelu"),
    eos_default=None,
    read=_read,
    write=_write,
    refuse=REFUSE,
    config_class=EncoderConfig,
    complete=functools.partial(complete_heads, "cls.predictions.transform.dense.weight"),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)

"""MPNet: RoBERTa's form without token types; attention has biases of distance, as in T5."""

import functools
from collections.abc import Mapping
from typing import Any

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.hf.families.bert import EMBEDDINGS, FIELDS, LAYERS, prefixed
from elastic_lm.hf.families.llama import replace_fields
from elastic_lm.hf.families.roberta import HEADS
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.heads import REFUSE, complete_heads, read_heads, write_heads
from elastic_lm.hf.layouts import QKV

PAD = 1  # positions are counted past this token, whatever config.json calls padding

ATTENTION = {
    "attn/qkv/kernel": Tensor(
        ("attention.attn.q.weight", "attention.attn.k.weight", "attention.attn.v.weight"), QKV
    ),
    "attn/qkv/bias": Tensor(("attention.attn.q.bias", "attention.attn.k.bias", "attention.attn.v.bias"), QKV),
    "attn/out/kernel": Tensor(("attention.attn.o.weight",)),
    "attn/out/bias": Tensor(("attention.attn.o.bias",)),
    "attn_norm/scale": Tensor(("attention.LayerNorm.weight",)),
    "attn_norm/bias": Tensor(("attention.LayerNorm.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    heads = read_heads(hf, "MPNet", pooler="tanh", base_pooler="tanh")
    return {"position_offset": PAD + 1, "max_len": values.get("max_len", 512) - PAD - 1, **heads}


def _write(config: EncoderConfig) -> dict[str, Any]:
    rows = config.max_len + config.position_offset
    return {"max_position_embeddings": rows, **write_heads(config, "MPNet")}


def _varying(config: EncoderConfig) -> dict[str, Tensor]:
    pooler = "classifier.dense." if config.n_labels else "mpnet.pooler.dense."
    return {"pooler/kernel": Tensor((pooler + "weight",)), "pooler/bias": Tensor((pooler + "bias",))}


MPNET = Family(
    model_type="mpnet",
    architecture="MPNetModel",
    prefix="mpnet.",
    layer="mpnet.encoder.layer.{}.",
    root=prefixed("mpnet.", EMBEDDINGS)
    | HEADS
    | {"relative_bias/table": Tensor(("mpnet.encoder.relative_attention_bias.weight",))},
    layers=LAYERS | ATTENTION,
    fields=tuple(
        field
        for field in replace_fields(FIELDS, Field("pad_id", "pad_token_id", PAD))
        if field.ours != "type_vocab_size"
    ),
    fixed={"type_vocab_size": 0, "relative": "bias", "relative_buckets": 32, "relative_max_distance": 128},
    activation=("hidden_act", "gelu"),
    eos_default=None,
    read=_read,
    write=_write,
    refuse=(
        *REFUSE,
        ("hidden_act", ("gelu", None)),  # its vocabulary head has no other
        ("relative_attention_num_buckets", (32, None)),  # transformers computes 32, whatever the key says
        ("pad_token_id", (PAD, None)),
    ),
    config_class=EncoderConfig,
    varying=_varying,
    complete=functools.partial(complete_heads, "lm_head.dense.weight"),
    copies={
        "lm_head.decoder.weight": "mpnet.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
)

"""RoBERTa: BERT's layers; positions count from padding's id + 1, task heads have their own pooler.

XLM-RoBERTa and CamemBERT are RoBERTas under other names.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.hf.families.bert import EMBEDDINGS, FIELDS, LAYERS, prefixed
from elastic_lm.hf.families.llama import replace_fields
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.heads import REFUSE, complete_heads, read_heads, write_heads

HEADS = {
    "head/kernel": Tensor(("classifier.out_proj.weight",)),
    "head/bias": Tensor(("classifier.out_proj.bias",)),
    "token_head/dense/kernel": Tensor(("lm_head.dense.weight",)),
    "token_head/dense/bias": Tensor(("lm_head.dense.bias",)),
    "token_head/norm/scale": Tensor(("lm_head.layer_norm.weight",)),
    "token_head/norm/bias": Tensor(("lm_head.layer_norm.bias",)),
    "token_head/bias": Tensor(("lm_head.bias",)),
}


def _read(stem: str, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    pad = values.get("pad_id", 1)
    return {
        "pad_id": pad,
        "position_offset": pad + 1,
        "max_len": values.get("max_len", 512) - pad - 1,
        **read_heads(hf, stem, pooler="tanh", base_pooler="tanh"),
    }


def _write(stem: str, config: EncoderConfig) -> dict[str, Any]:
    rows = config.max_len + config.position_offset
    return {"max_position_embeddings": rows, **write_heads(config, stem)}


def _varying(config: EncoderConfig) -> dict[str, Tensor]:
    pooler = "classifier.dense." if config.n_labels else "roberta.pooler.dense."
    return {"pooler/kernel": Tensor((pooler + "weight",)), "pooler/bias": Tensor((pooler + "bias",))}


ROBERTA = Family(
    model_type="roberta",
    architecture="RobertaModel",
    prefix="roberta.",
    layer="roberta.encoder.layer.{}.",
    root=prefixed("roberta.", EMBEDDINGS) | HEADS,
    layers=LAYERS,
    fields=replace_fields(FIELDS, Field("pad_id", "pad_token_id", 1)),
    fixed={},
    activation=("hidden_act", "gelu"),
    eos_default=None,
    read=functools.partial(_read, "Roberta"),
    write=functools.partial(_write, "Roberta"),
    refuse=(*REFUSE, ("hidden_act", ("gelu", None))),  # its vocabulary head has no other
    config_class=EncoderConfig,
    varying=_varying,
    complete=functools.partial(complete_heads, "lm_head.dense.weight"),
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
)


def _renamed(model_type: str, stem: str) -> Family:
    """RoBERTa with another model_type, and another beginning of its classes' names."""
    return dataclasses.replace(
        ROBERTA,
        model_type=model_type,
        architecture=stem + "Model",
        read=functools.partial(_read, stem),
        write=functools.partial(_write, stem),
    )


XLM_ROBERTA = _renamed("xlm-roberta", "XLMRoberta")
CAMEMBERT = _renamed("camembert", "Camembert")

"""ELECTRA: BERT's layers over embeddings that may be narrower; the discriminator's own head is not read."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.hf.families.bert import EMBEDDINGS, FIELDS, LAYERS, prefixed
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.heads import REFUSE, read_heads, write_heads

ROOT = prefixed("electra.", EMBEDDINGS) | {
    "embed_map/kernel": Tensor(("electra.embeddings_project.weight",)),
    "embed_map/bias": Tensor(("electra.embeddings_project.bias",)),
    "pooler/kernel": Tensor(("classifier.dense.weight",)),
    "pooler/bias": Tensor(("classifier.dense.bias",)),
    "head/kernel": Tensor(("classifier.out_proj.weight",)),
    "head/bias": Tensor(("classifier.out_proj.bias",)),
    "token_head/dense/kernel": Tensor(("generator_predictions.dense.weight",)),
    "token_head/dense/bias": Tensor(("generator_predictions.dense.bias",)),
    "token_head/norm/scale": Tensor(("generator_predictions.LayerNorm.weight",)),
    "token_head/norm/bias": Tensor(("generator_predictions.LayerNorm.bias",)),
    "token_head/bias": Tensor(("generator_lm_head.bias",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    # The discriminator, which most checkpoints are, tells replaced tokens from others; it is no task head.
    heads = read_heads(hf, "Electra", pooler="gelu", base_pooler="none", none="ElectraForPreTraining")
    return {"embed_map": values.get("embed_dim") != values["d_model"], **heads}


def _write(config: EncoderConfig) -> dict[str, Any]:
    return write_heads(config, "Electra")


def _complete(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    return dataclasses.replace(config, mlm=config.mlm or "generator_predictions.dense.weight" in names)


ELECTRA = Family(
    model_type="electra",
    architecture="ElectraModel",
    prefix="electra.",
    layer="electra.encoder.layer.{}.",
    root=ROOT,
    layers=LAYERS,
    fields=(*FIELDS, Field("embed_dim", "embedding_size", 128)),
    fixed={},
    activation=("hidden_act", "gelu"),
    eos_default=None,
    read=_read,
    write=_write,
    refuse=(*REFUSE, ("hidden_act", ("gelu", None))),  # its vocabulary head has no other
    config_class=EncoderConfig,
    complete=_complete,
    copies={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
)

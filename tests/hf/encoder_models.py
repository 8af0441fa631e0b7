"""Tiny random encoders of every family, made with transformers, and how we compare with them."""

from pathlib import Path
from typing import Any

import numpy as np
from hf_models import assert_same_model

from elastic_lm import hf
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder import Encoder

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, "layer_norm_eps": 1e-3, "pad_token_id": 0},
    "distilbert": {
        **{"vocab_size": 48, "dim": 32, "hidden_dim": 40, "n_layers": 2, "n_heads": 4},
        **{"max_position_embeddings": 40, "pad_token_id": 3},
    },
    "roberta": {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1},
    "xlm-roberta": {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1},
    "camembert": {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1},
    "electra": {**SIZES, "embedding_size": 12, "layer_norm_eps": 1e-3, "pad_token_id": 0},
    "deberta-v2": {
        **SIZES,
        **{"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
        **{"position_buckets": 4, "max_relative_positions": 8, "norm_rel_ebd": "layer_norm"},
        **{"position_biased_input": False, "pad_token_id": 0},
    },
    "modernbert": {
        **{**SIZES, "num_hidden_layers": 3, "intermediate_size": 24},
        **{"local_attention": 4, "global_attn_every_n_layers": 2, "pad_token_id": 3},
        **{"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    },
    "mpnet": {**SIZES, "layer_norm_eps": 1e-5, "pad_token_id": 1},
    "albert": {
        **SIZES,
        "num_hidden_layers": 3,
        "embedding_size": 12,
        "layer_norm_eps": 1e-3,
        "pad_token_id": 0,
    },
}
# Further forms: name -> (model_type, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "electra-base": ("electra", {"embedding_size": 32}),
    "deberta-v2-xl": (
        "deberta-v2",
        {"conv_kernel_size": 3, "conv_act": "gelu", "position_biased_input": True, "type_vocab_size": 2},
    ),
    "deberta-no-buckets": (
        "deberta-v2",
        {"position_buckets": -1, "max_relative_positions": 6, "norm_rel_ebd": "none", "conv_kernel_size": 5},
    ),
    "modernbert-mean": (
        "modernbert",
        {
            "classifier_pooling": "mean",
            "global_attn_every_n_layers": 3,
            "num_hidden_layers": 5,
            "local_attention": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "modernbert-global": ("modernbert", {"global_attn_every_n_layers": 1}),
    "albert-wide": ("albert", {"embedding_size": 32, "hidden_act": "relu"}),
    "xlm-roberta-types": ("xlm-roberta", {"type_vocab_size": 2, "pad_token_id": 2}),
}
LONG = {"max_position_embeddings": 200}  # longer than every window and bucket
NAMED = {"id2label": {0: "no", 1: "perhaps", 2: "yes"}, "label2id": {"no": 0, "perhaps": 1, "yes": 2}}
# Head -> (class of transformers, entries of config.json).
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("AutoModel", {}),
    "classification": ("AutoModelForSequenceClassification", NAMED),
    "regression": ("AutoModelForSequenceClassification", {"num_labels": 1}),
    "mlm": ("AutoModelForMaskedLM", {}),
}
# The head of each family that its golden file records.
GOLDEN = {
    **{"bert": "classification", "distilbert": "regression", "roberta": "mlm"},
    **{"xlm-roberta": "classification", "camembert": "mlm", "electra": "classification"},
    **{"deberta-v2": "classification", "modernbert": "classification", "mpnet": "mlm", "albert": "mlm"},
}
# Families whose models of transformers read no token types.
NO_TYPES = ("distilbert", "mpnet", "modernbert")


def random_encoder(model_type: str, head: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model whose every weight is drawn at random."""
    import torch
    import transformers

    cls, entries = HEADS[head]
    config = transformers.AutoConfig.for_model(model_type, **{**FAMILIES[model_type], **entries, **changes})
    model = getattr(transformers, cls).from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def load_their_encoder(folder: Path, head: str) -> Any:
    """Loads a folder with transformers and checks that it found every weight and no other."""
    import transformers

    model, report = getattr(transformers, HEADS[head][0]).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


def random_batch(
    model_type: str, lengths: tuple[int, ...] = (9, 5, 1), seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of different lengths, filled up with padding: tokens, mask and types."""
    draw = np.random.default_rng(seed).integers
    shape = (len(lengths), max(lengths))
    mask = np.arange(shape[1]) < np.asarray(lengths)[:, None]
    tokens = np.where(mask, draw(4, 48, shape), FAMILIES[model_type]["pad_token_id"])
    types = np.where(mask, draw(0, 2 if model_type in ("bert", "electra", "albert") else 1, shape), 0)
    return {"tokens": tokens, "mask": mask.astype(np.int64), "types": types}


def theirs(model: Any, batch: dict[str, np.ndarray], head: str) -> dict[str, np.ndarray]:
    """What transformers computes: `hidden` where there are tokens, and what the head gives."""
    import torch

    names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    inputs = {names[key]: torch.tensor(value) for key, value in batch.items()}
    if model.config.model_type in NO_TYPES:
        inputs.pop("token_type_ids")
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    found = {"hidden": out.hidden_states[-1].numpy()}
    if head == "base" and out.get("pooler_output") is not None:
        found["pooled"] = out["pooler_output"].numpy()
    if head != "base":
        found["token_logits" if head == "mlm" else "logits"] = out.logits.numpy()
    return there(found, batch)


def ours(config: EncoderConfig, params: Params, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same of our encoder, run operation by operation."""
    types = batch["types"] if config.type_vocab_size else None
    model = Encoder(config).bind({"params": params})
    out = model(batch["tokens"], batch["mask"], types, token_logits=config.mlm)
    found = {name: getattr(out, name) for name in ("hidden", "pooled", "logits", "token_logits")}
    return there({name: np.asarray(value) for name, value in found.items() if value is not None}, batch)


def there(found: dict[str, np.ndarray], batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values per token without those of padding, which say nothing; others as they are."""
    per_token = ("hidden", "token_logits")
    return {name: x[batch["mask"] == 1] if name in per_token else x for name, x in found.items()}


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Every wanted array is found, within `tolerance` of its largest magnitude."""
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        error = np.max(np.abs(found[name] - value)) / np.max(np.abs(value))
        assert error <= tolerance, (name, error)


def export_and_reload(config: EncoderConfig, params: Params, folder: Path, head: str) -> Any:
    """Exports, checks that re-import is bit-exact, and returns what transformers loads."""
    hf.export(config, params, folder)
    assert_same_model((config, params), hf.load(folder))
    return load_their_encoder(folder, head)

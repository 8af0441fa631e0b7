"""What the encoder families share: which of their heads a folder holds, and the names of labels."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.hf.family import typed

# Values of config.json for what all of them lack here.
REFUSE = (
    ("position_embedding_type", ("absolute", None)),
    ("is_decoder", (False, None)),
    ("add_cross_attention", (False, None)),
    ("tie_word_embeddings", (True, None)),
)
PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}


def read_heads(
    hf: Mapping[str, Any], stem: str, pooler: str, base_pooler: str, none: str = ""
) -> dict[str, Any]:
    """The heads that config.json names.

    Args:
      hf: parsed config.json.
      stem: what the names of the family's classes begin with, such as "Bert".
      pooler: the pooler under a task head.
      base_pooler: the pooler of the base model.
      none: name of a class whose head is not read.

    Returns:
      EncoderConfig fields `pooler`, `mlm` and, with a task head, `n_labels`, `problem` and `labels`.

    Raises:
      ValueError: the task head's labels are malformed, or its problem is not supported.
    """
    architectures = [name for name in hf.get("architectures") or [] if name != none]
    if stem + "ForSequenceClassification" in architectures:
        return {"pooler": pooler, **_read_labels(hf)}
    mlm = {stem + "ForMaskedLM", stem + "ForPreTraining"} & set(architectures)
    return {"pooler": "none" if mlm else base_pooler, "mlm": bool(mlm)}


def complete_heads(token_head: str, config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    """The heads that a folder holds: a masked language model may have a pooler, a base model none.

    Args:
      token_head: a tensor of the masked language model's head.
      config: with the heads that config.json names.
      names: of the folder's tensors, without the family's prefix.
    """
    pooled = config.n_labels > 0 or any(name.startswith("pooler.") for name in names)
    mlm = config.mlm or token_head in names
    return dataclasses.replace(config, pooler="tanh" if pooled else "none", mlm=mlm)


def write_heads(config: EncoderConfig, stem: str) -> dict[str, Any]:
    """Inverse of `read_heads`; a model with several heads is named after its task head."""
    head = "ForSequenceClassification" if config.n_labels else "ForMaskedLM" if config.mlm else "Model"
    entries: dict[str, Any] = {"architectures": [stem + head]}
    if config.n_labels:
        names = config.labels or _unnamed(config.n_labels)
        entries["id2label"] = {str(i): name for i, name in enumerate(names)}
        entries["label2id"] = {name: i for i, name in enumerate(names)}
        entries["problem_type"] = PROBLEMS[config.problem]
    return entries


def _unnamed(count: int) -> tuple[str, ...]:
    """The names that transformers gives to outputs without names."""
    return tuple(f"LABEL_{i}" for i in range(count))


def _read_labels(hf: Mapping[str, Any]) -> dict[str, Any]:
    labels = _label_names(hf)
    problem = hf.get("problem_type") or PROBLEMS["regression" if len(labels) == 1 else "classification"]
    fix = f"must be one of {', '.join(PROBLEMS.values())}"
    require(problem in PROBLEMS.values(), "problem_type", problem, fix)
    named = labels != _unnamed(len(labels))
    return {
        "n_labels": len(labels),
        "problem": next(ours for ours, theirs in PROBLEMS.items() if theirs == problem),
        "labels": labels if named else (),
    }


def _label_names(hf: Mapping[str, Any]) -> tuple[str, ...]:
    names = hf.get("id2label")
    if names is None:
        return _unnamed(typed(hf, "num_labels", int, 2))
    fix = 'must map "0", "1", ... to names'
    require(isinstance(names, Mapping) and len(names) > 0, "id2label", names, fix)
    by_id = {str(key): str(name) for key, name in names.items()}
    require(set(by_id) == {str(i) for i in range(len(by_id))}, "id2label", names, fix)
    return tuple(by_id[str(i)] for i in range(len(by_id)))

"""The text part of a folder that holds a model of images and text.

Such a folder describes its decoder under `text_config`, and puts a name before the decoder's tensors:
`language_model.model.`, or `model.language_model.` where transformers 5 wrote it.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from elastic_lm.hf.files import TensorFiles

# model_type of a folder whose decoder is read: that of its text, where the file does not say.
TEXT_TYPES = {"gemma3": "gemma3_text", "mistral3": "mistral"}
TIED = "tie_word_embeddings"
SHARED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "elastic",
    "quantization_config",
)

PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the text part; the file itself where it describes a model of text.

    Args:
      hf: parsed config.json.
    """
    kind, inner = hf.get("model_type"), hf.get("text_config")
    if kind not in TEXT_TYPES or not isinstance(inner, Mapping):
        return hf
    shared = {key: hf[key] for key in SHARED if hf.get(key) is not None}
    own = {key: value for key, value in inner.items() if value is not None}
    # The head belongs to the whole model, whose config decides whether it is the embedding.
    tied = {TIED: hf[TIED]} if hf.get(TIED) is not None else {}
    return {"model_type": TEXT_TYPES[kind], **shared, **own, **tied}


def text_tensors(tensors: TensorFiles) -> TensorFiles:
    """The tensors of the text part under the names of a model of text.

    Args:
      tensors: of a folder; returned as they are where none has the name of a text part before it.
    """
    names = {}
    for name in tensors.files:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is not None:
            names[PREFIXES[prefix] + name.removeprefix(prefix)] = name
    if not names:
        return tensors
    own = {name: name for name in tensors.files if name.startswith(("lm_head.", "elastic."))}
    left = sorted(set(tensors.files) - {*names.values(), *own})
    if left:
        warnings.warn(
            f"{tensors.files[left[0]]}: the text part is loaded; {len(left)} tensors of other parts, such as "
            f"{left[0]!r}, are ignored",
            stacklevel=3,
        )
    return tensors.under(own | names)

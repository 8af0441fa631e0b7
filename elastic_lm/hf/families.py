"""The supported families by `model_type`."""

import difflib
from typing import Any

from elastic_lm.hf.bert import BERT
from elastic_lm.hf.distilbert import DISTILBERT
from elastic_lm.hf.family import Family
from elastic_lm.hf.gemma2 import GEMMA2
from elastic_lm.hf.gpt2 import GPT2
from elastic_lm.hf.gpt_neox import GPT_NEOX
from elastic_lm.hf.llama import LLAMA
from elastic_lm.hf.mistral import MISTRAL
from elastic_lm.hf.nemotron import NEMOTRON
from elastic_lm.hf.qwen import QWEN2, QWEN3
from elastic_lm.hf.roberta import ROBERTA
from elastic_lm.hf.t5 import T5

DECODERS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GPT2, GPT_NEOX, NEMOTRON)
ENCODERS = (BERT, DISTILBERT, ROBERTA)
FAMILIES = {family.model_type: family for family in (*DECODERS, *ENCODERS, T5)}


def find_family(model_type: Any) -> Family:
    """The family of a `model_type`.

    Raises:
      ValueError: it is not supported; the message lists what is and suggests the closest.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.5)
    hint = f"; the closest is {near[0]!r}" if near else ""
    raise ValueError(f"model_type={model_type!r} is not supported{hint}. Supported: {', '.join(FAMILIES)}")

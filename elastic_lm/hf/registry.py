"""The supported families by `model_type`."""

import difflib
from typing import Any

from elastic_lm.hf.families.albert import ALBERT
from elastic_lm.hf.families.bart import BART, MARIAN, MBART, PEGASUS
from elastic_lm.hf.families.bert import BERT
from elastic_lm.hf.families.deberta import DEBERTA_V2
from elastic_lm.hf.families.distilbert import DISTILBERT
from elastic_lm.hf.families.electra import ELECTRA
from elastic_lm.hf.families.gemma2 import GEMMA2
from elastic_lm.hf.families.gpt2 import GPT2
from elastic_lm.hf.families.gpt_neox import GPT_NEOX
from elastic_lm.hf.families.llama import LLAMA
from elastic_lm.hf.families.mistral import MISTRAL
from elastic_lm.hf.families.modernbert import MODERNBERT
from elastic_lm.hf.families.mpnet import MPNET
from elastic_lm.hf.families.nemotron import NEMOTRON
from elastic_lm.hf.families.qwen import QWEN2, QWEN3
from elastic_lm.hf.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from elastic_lm.hf.families.t5 import MT5, T5, UMT5
from elastic_lm.hf.family import Family

DECODERS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GPT2, GPT_NEOX, NEMOTRON)
ENCODERS = (
    *(BERT, DISTILBERT, ROBERTA, XLM_ROBERTA, CAMEMBERT),
    *(ELECTRA, DEBERTA_V2, MODERNBERT, MPNET, ALBERT),
)
ENCODER_DECODERS = (T5, MT5, UMT5, BART, MBART, PEGASUS, MARIAN)
FAMILIES = {family.model_type: family for family in (*DECODERS, *ENCODERS, *ENCODER_DECODERS)}


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

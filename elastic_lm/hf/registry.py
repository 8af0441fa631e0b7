"""The supported families by `model_type`."""

import difflib
from typing import Any

from elastic_lm.hf.families.bert import BERT
from elastic_lm.hf.families.bloom import BLOOM
from elastic_lm.hf.families.distilbert import DISTILBERT
from elastic_lm.hf.families.falcon import FALCON
from elastic_lm.hf.families.gemma2 import GEMMA2
from elastic_lm.hf.families.gpt2 import GPT2
from elastic_lm.hf.families.gpt_bigcode import GPT_BIGCODE
from elastic_lm.hf.families.gpt_neo import GPT_NEO
from elastic_lm.hf.families.gpt_neox import GPT_NEOX
from elastic_lm.hf.families.gptj import GPTJ
from elastic_lm.hf.families.llama import LLAMA
from elastic_lm.hf.families.mistral import MISTRAL
from elastic_lm.hf.families.nemotron import NEMOTRON
from elastic_lm.hf.families.opt import OPT
from elastic_lm.hf.families.phi import PHI
from elastic_lm.hf.families.qwen import QWEN2, QWEN3
from elastic_lm.hf.families.roberta import ROBERTA
from elastic_lm.hf.families.stablelm import STABLELM
from elastic_lm.hf.families.starcoder2 import STARCODER2
from elastic_lm.hf.families.t5 import T5
from elastic_lm.hf.family import Family

DECODERS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GPT2, GPT_NEOX, NEMOTRON)
EARLIER_DECODERS = (GPT_NEO, GPTJ, GPT_BIGCODE, STARCODER2, OPT, BLOOM, FALCON, PHI, STABLELM)
ENCODERS = (BERT, DISTILBERT, ROBERTA)
FAMILIES = {family.model_type: family for family in (*DECODERS, *EARLIER_DECODERS, *ENCODERS, T5)}


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

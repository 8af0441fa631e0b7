"""The supported families by `model_type`."""

from typing import Any

from elastic_lm.hf.families.albert import ALBERT
from elastic_lm.hf.families.arcee import ARCEE
from elastic_lm.hf.families.bart import BART, MARIAN, MBART, PEGASUS
from elastic_lm.hf.families.bert import BERT
from elastic_lm.hf.families.bloom import BLOOM
from elastic_lm.hf.families.cohere import COHERE, COHERE2
from elastic_lm.hf.families.deberta import DEBERTA_V2
from elastic_lm.hf.families.distilbert import DISTILBERT
from elastic_lm.hf.families.electra import ELECTRA
from elastic_lm.hf.families.ernie import ERNIE
from elastic_lm.hf.families.falcon import FALCON
from elastic_lm.hf.families.gemma import GEMMA
from elastic_lm.hf.families.gemma2 import GEMMA2
from elastic_lm.hf.families.gemma3 import GEMMA3
from elastic_lm.hf.families.gpt2 import GPT2
from elastic_lm.hf.families.gpt_bigcode import GPT_BIGCODE
from elastic_lm.hf.families.gpt_neo import GPT_NEO
from elastic_lm.hf.families.gpt_neox import GPT_NEOX
from elastic_lm.hf.families.gptj import GPTJ
from elastic_lm.hf.families.granite import GRANITE
from elastic_lm.hf.families.helium import HELIUM
from elastic_lm.hf.families.llama import LLAMA
from elastic_lm.hf.families.ministral import MINISTRAL, MINISTRAL3
from elastic_lm.hf.families.mistral import MISTRAL
from elastic_lm.hf.families.modernbert import MODERNBERT
from elastic_lm.hf.families.mpnet import MPNET
from elastic_lm.hf.families.nemotron import NEMOTRON
from elastic_lm.hf.families.olmo import OLMO2, OLMO3
from elastic_lm.hf.families.opt import OPT
from elastic_lm.hf.families.phi import PHI
from elastic_lm.hf.families.phi3 import PHI3
from elastic_lm.hf.families.qwen import QWEN2, QWEN3
from elastic_lm.hf.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from elastic_lm.hf.families.seed_oss import SEED_OSS
from elastic_lm.hf.families.smollm3 import SMOLLM3
from elastic_lm.hf.families.stablelm import STABLELM
from elastic_lm.hf.families.starcoder2 import STARCODER2
from elastic_lm.hf.families.t5 import MT5, T5, UMT5
from elastic_lm.hf.family import Family
from elastic_lm.hf.relatives import RELATIVES

DECODERS = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GPT2, GPT_NEOX, NEMOTRON),
    *(GEMMA, GEMMA3, SMOLLM3, OLMO2, OLMO3, PHI3, GRANITE, COHERE, COHERE2),
    *(ARCEE, ERNIE, SEED_OSS, HELIUM, MINISTRAL, MINISTRAL3),
    *(GPT_NEO, GPTJ, GPT_BIGCODE, STARCODER2, OPT, BLOOM, FALCON, PHI, STABLELM),
)
ENCODERS = (
    *(BERT, DISTILBERT, ROBERTA, XLM_ROBERTA, CAMEMBERT),
    *(ELECTRA, DEBERTA_V2, MODERNBERT, MPNET, ALBERT),
)
ENCODER_DECODERS = (T5, MT5, UMT5, BART, MBART, PEGASUS, MARIAN)
FAMILIES = {family.model_type: family for family in (*DECODERS, *ENCODERS, *ENCODER_DECODERS)}


def find_family(model_type: Any) -> Family:
    """The family of a `model_type`.

    Raises:
      ValueError: it is not supported; the message lists what is, and names the closest relative.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    # Names that are spelled alike are no relatives: mamba is no llama.
    closest, besides = RELATIVES.get(str(model_type), ("", ""))
    hint = f"; the closest is {closest!r}, which has no {besides}" if closest in FAMILIES else ""
    raise ValueError(f"model_type={model_type!r} is not supported{hint}. Supported: {', '.join(FAMILIES)}")

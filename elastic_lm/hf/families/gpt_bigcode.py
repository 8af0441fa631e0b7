"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 whose query heads share a key and a value, not transposed."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.gpt2 import GPT2, ROOT
from elastic_lm.hf.families.gpt2 import LAYERS as GPT2_LAYERS
from elastic_lm.hf.family import Family, Tensor, typed
from elastic_lm.hf.layouts import HEADWISE_QKV

LAYERS = {path: Tensor(tensor.names) for path, tensor in GPT2_LAYERS.items()} | {
    "attn/qkv/kernel": Tensor(("attn.c_attn.weight",), HEADWISE_QKV),
    "attn/qkv/bias": Tensor(("attn.c_attn.bias",), HEADWISE_QKV),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    multi_query = typed(hf, "multi_query", bool, True)
    return GPT2.read(hf, values) | {"n_kv_heads": 1 if multi_query else values["n_heads"]}


def _write(config: ModelConfig) -> dict[str, Any]:
    return GPT2.write(config) | {"multi_query": config.n_kv_heads == 1}


GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    prefix=GPT2.prefix,
    layer=GPT2.layer,
    root=ROOT,
    layers=LAYERS,
    fields=GPT2.fields,
    fixed=GPT2.fixed,
    activation=("activation_function", "gelu_pytorch_tanh"),
    eos_default=50256,
    read=_read,
    write=_write,
    refuse=(("add_cross_attention", (False,)),),
    ignored={
        "inference_runner": None,
        "num_key_value_heads": None,  # follows from `multi_query`
        "pad_key_length": None,
        "pre_allocate_kv_cache": None,
        "validate_runner_input": None,
    },
)

"""GPT-Neo: learned positions, local attention in every other layer, queries and keys that are not scaled."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.checks import is_whole, require
from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.gpt2 import ROOT
from elastic_lm.hf.family import Family, Field, Tensor, number, typed
from elastic_lm.hf.layouts import QKV

LAYERS = {
    "attn_norm/scale": Tensor(("ln_1.weight",)),
    "attn_norm/bias": Tensor(("ln_1.bias",)),
    "attn/qkv/kernel": Tensor(
        (
            "attn.attention.q_proj.weight",
            "attn.attention.k_proj.weight",
            "attn.attention.v_proj.weight",
        ),
        QKV,
    ),
    "attn/out/kernel": Tensor(("attn.attention.out_proj.weight",)),
    "attn/out/bias": Tensor(("attn.attention.out_proj.bias",)),
    "mlp_norm/scale": Tensor(("ln_2.weight",)),
    "mlp_norm/bias": Tensor(("ln_2.bias",)),
    "mlp/up/kernel": Tensor(("mlp.c_fc.weight",)),
    "mlp/up/bias": Tensor(("mlp.c_fc.bias",)),
    "mlp/down/kernel": Tensor(("mlp.c_proj.weight",)),
    "mlp/down/bias": Tensor(("mlp.c_proj.bias",)),
}
GLOBAL, LOCAL = "global", "local"


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    window = number(hf, "window_size", 256, above=0)
    require(is_whole(window, 1), "window_size", window, "must be a whole number of tokens")
    windows = tuple(window if kind == LOCAL else 0 for kind in _kinds(hf, values["n_layers"]))
    return {
        "d_mlp": typed(hf, "intermediate_size", int, None) or 4 * values["d_model"],
        "windows": windows if any(windows) else (),
    }


def _kinds(hf: Mapping[str, Any], layers: int) -> list[str]:
    """The kind of attention of every layer: `attention_layers`, or `attention_types`, which repeats kinds."""
    key = "attention_layers" if hf.get("attention_layers") else "attention_types"
    types = hf.get("attention_types") or [[[GLOBAL, LOCAL], 12]]
    types = [[hf[key], 1]] if key == "attention_layers" else types
    fix = f"must be {layers} kinds in all (num_layers), {GLOBAL!r} or {LOCAL!r}"

    kinds: list[str] = []
    items: list[Any] = list(types) if isinstance(types, list | tuple) else [types]
    for item in items:
        right = isinstance(item, list | tuple) and len(item) == 2 and is_whole(item[1], 1, layers)
        right = right and isinstance(item[0], list | tuple) and all(k in (GLOBAL, LOCAL) for k in item[0])
        require(right, key, hf.get(key), fix)
        kinds += list(item[0]) * item[1]
    require(len(kinds) == layers, key, hf.get(key), fix)
    return kinds


def _write(config: ModelConfig) -> dict[str, Any]:
    kinds = [LOCAL if config.window(i) else GLOBAL for i in range(config.n_layers)]
    return {
        "attention_types": [[[kind], 1] for kind in kinds],
        "attention_layers": kinds,
        "window_size": max(config.windows, default=0) or 256,
        "intermediate_size": config.d_mlp,
    }


GPT_NEO = Family(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    prefix="transformer.",
    layer="transformer.h.{}.",
    root=ROOT,
    layers=LAYERS,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "hidden_size"),
        Field("n_layers", "num_layers", alias="num_hidden_layers"),
        Field("n_heads", "num_heads", alias="num_attention_heads"),
        Field("max_len", "max_position_embeddings", 2048),
        Field("norm_eps", "layer_norm_epsilon", 1e-5),
        Field("tied", "tie_word_embeddings", True),
        Field("bos_id", "bos_token_id", 50256),
    ),
    fixed={
        "norm": "layernorm",
        "gated": False,
        "position": "learned",
        "attn_scale": 1.0,
        "out_bias": True,
        "mlp_bias": True,
    },
    activation=("activation_function", "gelu_new"),
    eos_default=50256,
    read=_read,
    write=_write,
)

"""GPT-J: parallel branches with one norm, neighbouring dimensions rotated, a bias on the vocabulary head."""

import math
from collections.abc import Mapping
from typing import Any

from elastic_lm.config.checks import is_whole, require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.rope import RopeConfig
from elastic_lm.hf.families.gpt2 import ROOT
from elastic_lm.hf.family import Family, Field, Tensor, typed
from elastic_lm.hf.layouts import interleaved_qkv

LAYERS = {
    "attn_norm/scale": Tensor(("ln_1.weight",)),
    "attn_norm/bias": Tensor(("ln_1.bias",)),
    "attn/out/kernel": Tensor(("attn.out_proj.weight",)),
    "mlp/up/kernel": Tensor(("mlp.fc_in.weight",)),
    "mlp/up/bias": Tensor(("mlp.fc_in.bias",)),
    "mlp/down/kernel": Tensor(("mlp.fc_out.weight",)),
    "mlp/down/bias": Tensor(("mlp.fc_out.bias",)),
}


def _rotated(config: ModelConfig) -> dict[str, Tensor]:
    names = ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight")
    return {"attn/qkv/kernel": Tensor(names, interleaved_qkv(config.rotary_dim))}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = values["d_model"] // values["n_heads"]
    rotated = typed(hf, "rotary_dim", int, 64)
    fits = is_whole(rotated, 2, head_dim) and rotated % 2 == 0
    require(fits, "rotary_dim", rotated, f"must be even, and at most {head_dim}, the width of a head")

    # The fraction that gives `rotated` again, rounded down: 49 * (1 / 49) is below 1.
    fraction = rotated / head_dim
    fraction = fraction if int(head_dim * fraction) == rotated else math.nextafter(fraction, 1.0)
    return {
        "d_mlp": typed(hf, "n_inner", int, None) or 4 * values["d_model"],
        "rope": RopeConfig(fraction=fraction),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"n_inner": config.d_mlp, "rotary_dim": config.rotary_dim}


GPTJ = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    prefix="transformer.",
    layer="transformer.h.{}.",
    root={path: ROOT[path] for path in ROOT if path != "positions/table"}
    | {"head/bias": Tensor(("lm_head.bias",))},
    layers=LAYERS,
    varying_layers=_rotated,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "n_embd", alias="hidden_size"),
        Field("n_layers", "n_layer", alias="num_hidden_layers"),
        Field("n_heads", "n_head", alias="num_attention_heads"),
        Field("max_len", "n_positions", 2048),
        Field("norm_eps", "layer_norm_epsilon", 1e-5),
        Field("tied", "tie_word_embeddings", False),
        Field("bos_id", "bos_token_id", 50256),
    ),
    fixed={
        "norm": "layernorm",
        "gated": False,
        "parallel_residual": True,
        "shared_norm": True,
        "mlp_bias": True,
        "head_bias": True,
    },
    activation=("activation_function", "gelu_new"),
    eos_default=50256,
    read=_read,
    write=_write,
    ignored={"rotary": (True,), "scale_attn_weights": (True,)},
)

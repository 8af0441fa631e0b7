"""Phi-3, 3.5 and 4: Llama with fused projections; LongRoPE, and partial rotation in Phi-4-mini."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.llama import FIELDS, NORMS, ROOT, padding, replace_fields
from elastic_lm.hf.family import Family, Field, Tensor
from elastic_lm.hf.layouts import FUSED_GATE_UP, FUSED_QKV
from elastic_lm.hf.rope import ORIGINAL, rope_from_hf, rope_to_hf
from elastic_lm.hf.windows import uniform_windows

LAYERS = {
    "attn/qkv/kernel": Tensor(("self_attn.qkv_proj.weight",), FUSED_QKV),
    "attn/out/kernel": Tensor(("self_attn.o_proj.weight",)),
    "mlp/up/kernel": Tensor(("mlp.gate_up_proj.weight",), FUSED_GATE_UP),
    "mlp/down/kernel": Tensor(("mlp.down_proj.weight",)),
}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    rope, heads = rope_from_hf(hf, values["max_len"], original=4096), values["n_heads"]
    # Their config counts the rotated pairs of heads that are as wide as the model allows.
    width = values.get("head_dim", 0)
    fits = rope.scaling != "longrope" or not width or width * heads == values["d_model"]
    require(fits, "head_dim", width, f"must be hidden_size={values['d_model']} / num_attention_heads={heads}")
    return {"rope": rope, "windows": uniform_windows(hf, values["n_layers"], 0)}


def _write(config: ModelConfig) -> dict[str, Any]:
    entries = rope_to_hf(config.rope, config.max_len, fraction_key="partial_rotary_factor")
    if config.rope.scaling == "longrope":
        # Releases of transformers before 5 want nothing else in the mapping of the old style.
        entries[ORIGINAL] = config.rope.original_max_len
        del entries["rope_scaling"][ORIGINAL]
    return entries | {"sliding_window": config.window(0) or None} | padding(config, 32000)


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    prefix="model.",
    layer="model.layers.{}.",
    root=ROOT,
    layers=NORMS | LAYERS,
    fields=replace_fields(
        FIELDS,
        Field("max_len", "max_position_embeddings", 4096),
        Field("norm_eps", "rms_norm_eps", 1e-5),
    ),
    fixed={},
    activation=("hidden_act", "silu"),
    eos_default=32000,
    read=_read,
    write=_write,
    ignored={"full_attn_mod": (1,), "interpolate_factor": (1,)},
)

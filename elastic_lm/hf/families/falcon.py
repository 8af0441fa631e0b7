"""Falcon: parallel branches with one norm (7B) or two (40B), or none of that and ALiBi (RW-1B)."""

from collections.abc import Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.hf.families.bloom import LAYERS as BLOOM_LAYERS
from elastic_lm.hf.families.bloom import ROOT as BLOOM_ROOT
from elastic_lm.hf.families.llama import read_rope, write_rope
from elastic_lm.hf.family import Family, Field, Tensor, typed


def _norms(config: ModelConfig) -> dict[str, Tensor]:
    """The names of the norms, which differ where two of them are parallel."""
    if not config.parallel_residual or config.shared_norm:
        return {}
    names = {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"}
    ends = {"scale": "weight", "bias": "bias"}
    return {f"{o}/{e}": Tensor((f"{t}.{end}",)) for o, t in names.items() for e, end in ends.items()}


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = values["n_heads"], values["d_model"]
    new = typed(hf, "new_decoder_architecture", bool, False)
    parallel = typed(hf, "parallel_attn", bool, True)
    require(parallel or not new, "parallel_attn", parallel, "must be true with new_decoder_architecture")
    norms = typed(hf, "num_ln_in_parallel_attn", int, None) or (2 if new else 1)
    one_or_two = norms in ((1, 2) if new else (1,))
    fix = "must be 1, or 2 with new_decoder_architecture"
    require(one_or_two or not parallel, "num_ln_in_parallel_attn", norms, fix)

    # 7B's and RW-1B's forms have one key/value head or all of them, whatever `num_kv_heads` says.
    one, grouped = typed(hf, "multi_query", bool, True), typed(hf, "num_kv_heads", int, heads)
    found = {
        "n_kv_heads": grouped if new else 1 if one else heads,
        "d_mlp": typed(hf, "ffn_hidden_size", int, None) or 4 * width,
        "parallel_residual": parallel,
        "shared_norm": parallel and norms == 1,
    }
    if not typed(hf, "alibi", bool, False):
        return found | read_rope(hf, values)
    # The penalties that the published models were trained with.
    return found | {"position": "alibi", "alibi_scale": (width // heads) ** -0.5, "alibi_rounded": True}


def _write(config: ModelConfig) -> dict[str, Any]:
    # The form of 7B where it can say so, which has one norm and either one key/value head or all of them.
    two_norms = config.parallel_residual and not config.shared_norm
    grouped = config.n_kv_heads not in (1, config.n_heads)
    new = two_norms or (config.parallel_residual and grouped)
    entries = {
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if new else None,
        "multi_query": config.n_kv_heads == 1 and not new,
        "num_kv_heads": config.n_kv_heads,
        "parallel_attn": config.parallel_residual,
        "ffn_hidden_size": config.d_mlp,
        "alibi": config.position == "alibi",
    }
    return entries if entries["alibi"] else entries | write_rope(config)


FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    prefix="transformer.",
    layer="transformer.h.{}.",
    root={path: BLOOM_ROOT[path] for path in BLOOM_ROOT if not path.startswith("embed_norm")},
    layers=BLOOM_LAYERS,
    varying_layers=_norms,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "hidden_size", alias="n_embed"),
        Field("n_layers", "num_hidden_layers"),
        Field("n_heads", "num_attention_heads"),
        Field("max_len", "max_position_embeddings", 2048),
        Field("norm_eps", "layer_norm_epsilon", 1e-5),
        Field("tied", "tie_word_embeddings", True),
        Field("qkv_bias", "bias", False),
        Field("out_bias", "bias", False),
        Field("mlp_bias", "bias", False),
        Field("bos_id", "bos_token_id", 11),
    ),
    fixed={"norm": "layernorm", "gated": False},
    activation=("activation", "gelu"),
    eos_default=11,
    read=_read,
    write=_write,
    refuse=(("apply_residual_connection_post_layernorm", (False,)),),
    ignored={
        "ff_factor": (4,),
        "rope_parameters": None,  # read where ALiBi does not take its place
        "rope_scaling": None,
        "rope_theta": None,
    },
)

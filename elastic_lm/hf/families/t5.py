"""T5, T5 1.1, Flan-T5, mT5 and UMT5: encoder and decoder under prefixes of their own, one embedding for both.

T5 1.0 ties the vocabulary head and scales what it reads. T5 1.1 does neither; transformers 4 says both in
`tie_word_embeddings`, transformers 5 keeps the scale under `scale_decoder_outputs` and writes that every
model is tied, so that only the tensors tell. mT5 never scales. UMT5 scales where its file says that it is
tied, which transformers 5 makes of every file; its layers all have biases of distance.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.hf.family import ACTIVATIONS, Family, Field, Tensor, typed
from elastic_lm.hf.generation import read_limits, write_limits
from elastic_lm.hf.layouts import GATE_UP, HEADS, KEY_VALUE, QKV

EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of the embedding

ROOT = {"embed/table": Tensor((EMBEDDING,)), "head/kernel": Tensor((HEAD,))}


def _attention(name: str) -> tuple[str, str, str, str]:
    q, k, v, o = (f"{name}.{part}.weight" for part in "qkvo")
    return q, k, v, o


def _mlp(config: EncoderDecoderConfig, prefix: str) -> dict[str, Tensor]:
    names = tuple(f"{prefix}.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1"))
    up = Tensor(names, GATE_UP) if config.gated else Tensor((f"{prefix}.DenseReluDense.wi.weight",))
    return {
        "mlp_norm/scale": Tensor((f"{prefix}.layer_norm.weight",)),
        "mlp/up/kernel": up,
        "mlp/down/kernel": Tensor((f"{prefix}.DenseReluDense.wo.weight",)),
    }


def _layer(config: EncoderDecoderConfig, prefix: str, decodes: bool, has_bias: bool) -> dict[str, Tensor]:
    """Parameters of one layer, by path in the layer."""
    q, k, v, o = _attention(f"{prefix}.layer.0.SelfAttention")
    tensors = {
        "attn_norm/scale": Tensor((f"{prefix}.layer.0.layer_norm.weight",)),
        "attn/qkv/kernel": Tensor((q, k, v), QKV),
        "attn/out/kernel": Tensor((o,)),
    }
    if has_bias:
        name = f"{prefix}.layer.0.SelfAttention.relative_attention_bias.weight"
        tensors["relative_bias/table"] = Tensor((name,))
    if decodes:
        q, k, v, o = _attention(f"{prefix}.layer.1.EncDecAttention")
        tensors |= {
            "cross_norm/scale": Tensor((f"{prefix}.layer.1.layer_norm.weight",)),
            "cross/q/kernel": Tensor((q,), HEADS),
            "cross/kv/kernel": Tensor((k, v), KEY_VALUE),
            "cross/out/kernel": Tensor((o,)),
        }
    return tensors | _mlp(config, f"{prefix}.layer.{1 + decodes}")


def _stacks(config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """Parameters of both stacks, by path."""
    fix = "transformers' T5 has no head on its encoder: leave it out, or save an elastic checkpoint"
    require(not config.n_labels, "n_labels", config.n_labels, fix)
    tensors = {}
    for stack, count in (("encoder", config.n_layers), ("decoder", config.n_decoder_layers)):
        for i in range(count):
            has_bias = config.bias_per_layer or i == 0
            layer = _layer(config, f"{stack}.block.{i}", stack == "decoder", has_bias)
            tensors |= {f"{stack}/layers_{i}/{path}": tensor for path, tensor in layer.items()}
        tensors[f"{stack}/final_norm/scale"] = Tensor((f"{stack}.final_layer_norm.weight",))
    return tensors


def _complete(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """The config, untied where an unscaled model has its own head (T5 1.1 as transformers 5 saves it)."""
    return config if config.scaled_head else _complete_umt5(config, names)


def _complete_umt5(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """The config, untied where the model has a head beside its embedding."""
    both = HEAD in names and any(name in names for name in (EMBEDDING, *COPIES))
    return dataclasses.replace(config, tied=False) if both else config


def _fields(
    scaled: bool | None, projection: str, hf: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Further fields; `scaled` and `projection` are what missing keys mean (None = as `tied` says)."""
    name = typed(hf, "feed_forward_proj", str, projection)
    gated, activation = name.startswith("gated-"), name.removeprefix("gated-")
    known = ", ".join((*ACTIVATIONS, *(f"gated-{a}" for a in ACTIVATIONS)))
    require(activation in ACTIVATIONS, "feed_forward_proj", name, f"is not supported; supported: {known}")
    return {
        "gated": gated,
        # What T5 1.1 calls gated-gelu is GELU's approximation.
        "activation": "gelu_tanh" if name == "gated-gelu" else ACTIVATIONS[activation],
        "scaled_head": values.get("tied", True) if scaled is None else scaled,
        **read_limits(hf),
    }


def _read(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return _fields(typed(hf, "scale_decoder_outputs", bool, None), "relu", hf, values)


def _read_umt5(hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return _fields(typed(hf, "tie_word_embeddings", bool, True), "gated-gelu", hf, values)


def _entries(config: EncoderDecoderConfig) -> dict[str, Any]:
    names = {"gelu_tanh": "gelu", "gelu": "gelu_python"} if config.gated else {"gelu_tanh": "gelu_new"}
    activation = names.get(config.activation, config.activation)
    return {
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "is_encoder_decoder": True,
        **write_limits(config),
    }


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    return {**_entries(config), "scale_decoder_outputs": config.scaled_head}


def _write_mt5(config: EncoderDecoderConfig) -> dict[str, Any]:
    # For transformers 4; version 5 looks at the tensors, as we do.
    return {**_entries(config), "tie_word_embeddings": config.tied}


def _write_umt5(config: EncoderDecoderConfig) -> dict[str, Any]:
    # The key says whether the head is scaled; only the tensors say whether it is the embedding.
    return {**_entries(config), "tie_word_embeddings": config.scaled_head}


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    prefix="",
    layer="",
    root=ROOT,
    layers={},
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "d_model"),
        Field("n_layers", "num_layers"),
        Field("n_decoder_layers", "num_decoder_layers", None),
        Field("n_heads", "num_heads"),
        Field("head_dim", "d_kv", 64),
        Field("d_mlp", "d_ff"),
        Field("relative_buckets", "relative_attention_num_buckets", 32),
        Field("relative_max_distance", "relative_attention_max_distance", 128),
        Field("norm_eps", "layer_norm_epsilon", 1e-6),
        Field("tied", "tie_word_embeddings", True),
        Field("pad_id", "pad_token_id", 0),
        Field("decoder_start_id", "decoder_start_token_id", 0),
    ),
    fixed={},
    activation=("feed_forward_proj", "relu"),
    eos_default=1,
    read=_read,
    write=_write,
    ignored={"dense_act_fn": None, "is_gated_act": None, "n_positions": None},
    config_class=EncoderDecoderConfig,
    varying=_stacks,
    complete=_complete,
    copies=dict.fromkeys(COPIES, EMBEDDING),
    inside=("encoder.", "decoder."),
)

MT5 = dataclasses.replace(
    T5,
    model_type="mt5",
    architecture="MT5ForConditionalGeneration",
    fields=tuple(field for field in T5.fields if field.ours != "tied"),
    read=functools.partial(_fields, False, "gated-gelu"),
    write=_write_mt5,
    # Only the tensors say whether the head is the embedding.
    ignored={**T5.ignored, "tie_word_embeddings": None},
)
UMT5 = dataclasses.replace(
    MT5,
    model_type="umt5",
    architecture="UMT5ForConditionalGeneration",
    fixed={"bias_per_layer": True},
    read=_read_umt5,
    write=_write_umt5,
    complete=_complete_umt5,
    ignored={**T5.ignored, "scalable_attention": None},
)

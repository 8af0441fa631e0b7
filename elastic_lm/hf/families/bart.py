"""BART, mBART, Pegasus and Marian: positions as vectors, biases everywhere, one embedding for both stacks.

They differ in four things: where norms stand, whether one stands after the embeddings, whether positions are
learned or sinusoids, and which tokens begin a text.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.hf.family import Family, Field, Tensor, typed
from elastic_lm.hf.generation import read_limits, write_limits
from elastic_lm.hf.layouts import HEADS, KEY_VALUE, QKV, Layout

EMBEDDING, BIAS = "model.shared.weight", "final_logits_bias"
COPIES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")  # of the embedding
POSITION_ROWS = 2  # of a learned table, before the first position

# [V] stored as [1, V].
ROW = Layout(
    shapes=lambda config, shape: [(1, *shape)],
    join=lambda tensors, shape: tensors[0].reshape(shape),
    split=lambda config, leaf: [np.asarray(leaf)[None]],
)
ROOT = {
    "embed/table": Tensor((EMBEDDING,)),
    "head/kernel": Tensor(("lm_head.weight",)),
    "logits_bias/bias": Tensor((BIAS,), ROW),
}


def _norm(ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}/scale": Tensor((theirs + ".weight",)), f"{ours}/bias": Tensor((theirs + ".bias",))}


def _dense(ours: str, *theirs: str, layout: Layout | None = None) -> dict[str, Tensor]:
    """Kernel and bias of one projection of ours."""
    found = {}
    for part, ending in (("kernel", ".weight"), ("bias", ".bias")):
        names = tuple(name + ending for name in theirs)
        found[f"{ours}/{part}"] = Tensor(names) if layout is None else Tensor(names, layout)
    return found


def _layer(prefix: str, decodes: bool) -> dict[str, Tensor]:
    """Parameters of one layer, by path in the layer."""
    own = [f"{prefix}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    tensors = _dense("attn/qkv", *own, layout=QKV)
    tensors |= _dense("attn/out", f"{prefix}.self_attn.out_proj")
    tensors |= _norm("attn_norm", f"{prefix}.self_attn_layer_norm")
    if decodes:
        cross = f"{prefix}.encoder_attn"
        tensors |= _dense("cross/q", f"{cross}.q_proj", layout=HEADS)
        tensors |= _dense("cross/kv", f"{cross}.k_proj", f"{cross}.v_proj", layout=KEY_VALUE)
        tensors |= _dense("cross/out", f"{cross}.out_proj")
        tensors |= _norm("cross_norm", f"{cross}_layer_norm")
    tensors |= _dense("mlp/up", f"{prefix}.fc1") | _dense("mlp/down", f"{prefix}.fc2")
    return tensors | _norm("mlp_norm", f"{prefix}.final_layer_norm")


def _stacks(config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """Parameters of both stacks, by path."""
    fix = "transformers has no head on the encoder: leave it out, or save an elastic checkpoint"
    require(not config.n_labels, "n_labels", config.n_labels, fix)
    tensors = {}
    for stack, count in (("encoder", config.n_layers), ("decoder", config.n_decoder_layers)):
        for i in range(count):
            layer = _layer(f"model.{stack}.layers.{i}", stack == "decoder")
            tensors |= {f"{stack}/layers_{i}/{path}": tensor for path, tensor in layer.items()}
        tensors[f"{stack}/positions/table"] = Tensor((f"model.{stack}.embed_positions.weight",))
        tensors |= _norm(f"{stack}/embed_norm", f"model.{stack}.layernorm_embedding")
        tensors |= _norm(f"{stack}/final_norm", f"model.{stack}.layer_norm")
    return tensors


def _complete(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    return dataclasses.replace(config, logits_bias=BIAS in names)


def _read(starts: int | None, ends: int, hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Further fields; `starts` is the usual bos of a family whose texts begin with it, `ends` its eos."""
    for size, default in (("attention_heads", 16), ("ffn_dim", 4096)):
        encoder, decoder = hf.get(f"encoder_{size}"), typed(hf, f"decoder_{size}", int, default)
        fix = f"must be encoder_{size}={encoder}: both stacks have one shape"
        require(decoder == encoder, f"decoder_{size}", decoder, fix)
    words = typed(hf, "decoder_vocab_size", int, values["vocab_size"])
    fix = f"must be vocab_size={values['vocab_size']}: both stacks have one vocabulary"
    require(words == values["vocab_size"], "decoder_vocab_size", words, fix)
    return {
        "text_start_id": None if starts is None else typed(hf, "bos_token_id", int, starts),
        **read_limits(hf, forced_eos_id=ends),
    }


def _write(starts: int | None, config: EncoderDecoderConfig) -> dict[str, Any]:
    entries = {
        "decoder_attention_heads": config.n_heads,
        "decoder_ffn_dim": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "is_encoder_decoder": True,
        **write_limits(config, always=True),
    }
    return entries if starts is None else entries | {"bos_token_id": config.text_start_id}


def _family(
    model_type: str,
    stem: str,
    *,
    starts: int | None = None,
    ends: int,
    pad: int,
    decoder_start: int,
    **fixed: Any,
) -> Family:
    """A family of this form.

    Args:
      model_type: as in config.json.
      stem: what the names of its classes begin with.
      starts: usual token at the beginning of sources and targets; None = there is none.
      ends: usual token at their end.
      pad: usual token that fills rows up.
      decoder_start: usual token before a target.
      **fixed: fields of the config that all of its models have.
    """
    return Family(
        model_type=model_type,
        architecture=stem,
        prefix="model.",
        layer="",
        root=ROOT,
        layers={},
        fields=(
            Field("vocab_size", "vocab_size"),
            Field("d_model", "d_model"),
            Field("n_layers", "encoder_layers"),
            Field("n_decoder_layers", "decoder_layers"),
            Field("n_heads", "encoder_attention_heads"),
            Field("d_mlp", "encoder_ffn_dim"),
            Field("max_len", "max_position_embeddings", 1024),
            Field("scaled_embedding", "scale_embedding", False),
            Field("tied", "tie_word_embeddings", True),
            Field("pad_id", "pad_token_id", pad),
            Field("decoder_start_id", "decoder_start_token_id", decoder_start),
        ),
        fixed={"norm": "layernorm", "norm_eps": 1e-5, "biases": True, "scaled_head": False, **fixed},
        activation=("activation_function", "gelu"),
        eos_default=ends,
        read=functools.partial(_read, starts, ends),
        write=functools.partial(_write, starts),
        refuse=(("share_encoder_decoder_embeddings", (True, None)),),
        # transformers reads none of these.
        ignored=dict.fromkeys(
            (
                *("normalize_before", "normalize_embedding", "add_final_layer_norm", "add_bias_logits"),
                *("static_position_embeddings", "extra_pos_embeddings"),
                # How a smaller BART was distilled.
                *("replacing_rate", "save_step", "student_encoder_layers", "student_decoder_layers"),
            )
        ),
        config_class=EncoderDecoderConfig,
        varying=_stacks,
        complete=_complete,
        copies=dict.fromkeys(COPIES, EMBEDDING),
        inside=("model.encoder.", "model.decoder.", "encoder.", "decoder."),
    )


LEARNED: dict[str, Any] = {"positions": "learned", "position_offset": POSITION_ROWS, "embed_norm": True}
SINUSOIDAL: dict[str, Any] = {"positions": "sinusoidal"}

BART = _family(
    "bart",
    "BartForConditionalGeneration",
    starts=0,
    ends=2,
    pad=1,
    decoder_start=2,
    pre_norm=False,
    **LEARNED,
)
# Languages begin and end a text in ways that the checkpoints do not say: sources are best given as token ids.
MBART = _family(
    "mbart", "MBartForConditionalGeneration", ends=2, pad=1, decoder_start=0, pre_norm=True, **LEARNED
)
PEGASUS = _family(
    "pegasus", "PegasusForConditionalGeneration", ends=1, pad=0, decoder_start=0, pre_norm=True, **SINUSOIDAL
)
MARIAN = _family(
    "marian", "MarianMTModel", ends=0, pad=58100, decoder_start=58100, pre_norm=False, **SINUSOIDAL
)

"""A GGUF file as a Hugging Face folder: the entries of config.json, and tensors under transformers' names.

llama.cpp's converter changes three things, which are undone here: in a Llama it interleaves the two halves of
every query and key head, it adds 1 to the scales of Gemma's norms, and it replaces the parameters of Llama
3's rotary embedding with the factors that they give, one for each frequency.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.data.gguf_tokenizer import ending_ids
from elastic_lm.files.gguf import FLOATS, GGUF, open_gguf
from elastic_lm.hf.files import TensorFiles
from elastic_lm.hf.layouts import Shape
from elastic_lm.models.finite import check_tensor

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
ROOT = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SANDWICH = LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# Keys of the metadata below the architecture's name -> keys of config.json.
SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
ROPE = ("freq_base", "dimension_count", "scaling.type", "scaling.factor", "scaling.original_context_length")
# What is read beside the sizes, and what changes nothing here.
KNOWN = (
    *("vocab_size", "attention.key_length", "tensor_data_layout"),
    *(f"rope.{key}" for key in (*ROPE, "scaling.finetuned")),
)
# Values under which further keys change nothing.
NEUTRAL = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
}
WINDOW = ("attention.sliding_window", "attention.sliding_window_pattern")
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
LOCAL_BASE = "rope.freq_base_swa"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures is stored.

    Attributes:
      model_type: of `transformers`.
      layer: names of tensors in a layer, without the layer's number and the ending.
      interleaved: the halves of query and key heads are interleaved.
      offset: what the converter added to the scales of norms.
      entries: further entries of config.json.
      keys: of the metadata that they read.
    """

    model_type: str
    layer: Mapping[str, str]
    interleaved: bool = False
    offset: float = 0.0
    entries: Callable[["Source"], dict[str, Any]] = lambda source: {}
    keys: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """A file with the architecture that its metadata name."""

    file: GGUF
    architecture: str

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata below the architecture's name."""
        return self.file.value(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """`get` of a number that must be there."""
        value = self.get(key)
        fix = "must be one number; a file with other values for each layer is not supported"
        require(type(value) in (int, float), f"{self.file.path}: {self.architecture}.{key}", value, fix)
        return value

    @property
    def head_dim(self) -> int:
        """Sizes of a head."""
        even = self.need("embedding_length") // self.need("attention.head_count")
        return self.get("attention.key_length") or self.get("rope.dimension_count") or even


def _biased(source: Source) -> dict[str, Any]:
    names = source.file.tensors
    return {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_up.bias" in names}


def _gemma1(source: Source) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh"}


def _gemma(source: Source, large: int) -> dict[str, Any]:
    """The scale of queries, which no key tells: the largest model of a generation has another."""
    by_width = source.need("block_count") == large
    heads = source.need("attention.head_count")
    return {
        "query_pre_attn_scalar": source.need("embedding_length") // heads if by_width else source.head_dim,
        "sliding_window": source.get("attention.sliding_window"),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma2(source: Source) -> dict[str, Any]:
    return _gemma(source, large=46) | {key: source.get(key) for key in CAPS}


def _gemma3(source: Source) -> dict[str, Any]:
    layers = source.need("block_count")
    kinds = ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(layers)]
    return _gemma(source, large=62) | {
        "layer_types": kinds,
        "rope_local_base_freq": source.get(LOCAL_BASE, 10000.0),
    }


ARCHITECTURES = {
    "llama": Architecture("llama", LAYER, interleaved=True, entries=_biased),
    "qwen2": Architecture("qwen2", LAYER),
    "qwen3": Architecture("qwen3", LAYER),
    "gemma": Architecture("gemma", LAYER, offset=1.0, entries=_gemma1),
    "gemma2": Architecture("gemma2", SANDWICH, offset=1.0, entries=_gemma2, keys=(*WINDOW, *CAPS)),
    "gemma3": Architecture("gemma3_text", SANDWICH, offset=1.0, entries=_gemma3, keys=(*WINDOW, LOCAL_BASE)),
}


def config_entries(path: Path) -> dict[str, Any]:
    """The config.json of the model in a file.

    Raises:
      ValueError: it cannot be read, its architecture is not supported, or a key may change what the model
        computes in a way that is not known; names the key.
    """
    source, architecture = _source(path)
    _check_keys(source, architecture)

    file = source.file
    sizes = {theirs: source.need(key) for key, theirs in SIZES.items() if source.get(key) is not None}
    if EMBEDDING not in file.tensors:
        raise ValueError(f"{path}: has no tensor {EMBEDDING!r}; download or copy the file again")
    return {
        "model_type": architecture.model_type,
        **sizes,
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "head_dim": source.head_dim,
        "tie_word_embeddings": HEAD not in file.tensors,
        "torch_dtype": _dtype(file),
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ending_ids(file) or None,
        **_rope(source),
        **architecture.entries(source),
    }


def _check_keys(source: Source, architecture: Architecture) -> None:
    """Refuses metadata of the architecture that are not understood."""
    even = {"attention.value_length": source.head_dim} | NEUTRAL
    for key in source.file.keys(f"{source.architecture}."):
        short, value = key.removeprefix(f"{source.architecture}."), source.file.value(key)
        known = short in SIZES or short in KNOWN or short in architecture.keys
        fix = "is not known here, and may change what the model computes; use its Hugging Face folder"
        require(known or (short in even and value == even[short]), f"{source.file.path}: {key}", value, fix)


def _source(path: Path) -> tuple[Source, Architecture]:
    file = open_gguf(path)
    name = file.architecture
    fix = f"is not read from GGUF; supported: {', '.join(ARCHITECTURES)}. Use the model's Hugging Face folder"
    require(name in ARCHITECTURES, f"{path}: general.architecture", name, fix)
    return Source(file, name), ARCHITECTURES[name]


def _dtype(file: GGUF) -> str:
    """The type of most matrices; bfloat16 for quantised ones."""
    kinds = Counter(file.tensors[name].kind for name in file.tensors if len(file.tensors[name].shape) > 1)
    most = kinds.most_common(1)[0][0] if kinds else "F32"
    return {"F32": "float32", "F64": "float32", "F16": "float16"}.get(most, "bfloat16")


def _rope(source: Source) -> dict[str, Any]:
    """The rotary settings in the style of transformers 4."""
    kind, factor = source.get("rope.scaling.type", "none"), source.get("rope.scaling.factor")
    settings: dict[str, Any] = {"rope_theta": source.get("rope.freq_base", 10000.0)}
    whole = source.get("rope.dimension_count", source.head_dim)
    fix = f"only whole heads of {source.head_dim} are rotated here; use the model's Hugging Face folder"
    require(whole == source.head_dim, f"{source.architecture}.rope.dimension_count", whole, fix)
    if ROPE_FACTORS in source.file.tensors:
        return settings | {"rope_scaling": _llama3_scaling(source, settings["rope_theta"])}
    if kind == "none":
        return settings
    key = f"{source.architecture}.rope.scaling.type"
    require(kind in ("linear", "yarn"), key, kind, "must be linear or yarn; use the Hugging Face folder")
    scaling = {"rope_type": kind, "factor": factor}
    if original := source.get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = original
    return settings | {"rope_scaling": scaling}


def _llama3_scaling(source: Source, theta: float) -> dict[str, Any]:
    """The parameters of Llama 3's rotary embedding that give the factors in the file.

    Raises:
      ValueError: the factors are none of Llama 3.
    """
    stored = source.file.read(ROPE_FACTORS).reshape(-1).astype(np.float64)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, source.head_dim, 2) / source.head_dim)
    for original in (2**power for power in range(11, 18)):
        factor, low, high = float(stored.max()), 1.0, 4.0
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        due = 1 / ((1 - smooth) / factor + smooth)
        if stored.shape == due.shape and np.allclose(stored, due, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(
        f"{source.file.path}: tensor {ROPE_FACTORS!r} holds other factors than those of Llama 3's rotary "
        "embedding; use the model's Hugging Face folder"
    )


class GGUFTensors(TensorFiles):
    """The tensors of a GGUF file under the names, and with the values, that they have in transformers."""

    def __init__(self, path: Path) -> None:
        """Opens a file.

        Raises:
          ValueError: it holds a tensor that is not known in its architecture.
        """
        source, self._architecture = _source(path)
        self._file = source.file
        self._heads = {
            "attn_q": source.need("attention.head_count"),
            "attn_k": source.get("attention.head_count_kv", source.need("attention.head_count")),
        }
        self._in_file = dict(self._names())
        super().__init__(dict.fromkeys(self._in_file, path))

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self._file.tensors[self._in_file[name]].shape

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, as it was before it was converted.

        Raises:
          ValueError: its type cannot be dequantised, or a value is NaN or infinity; names file and tensor.
        """
        stored = self._in_file[name]
        values = self._file.read(stored)
        part = stored.split(".")[-2]
        if self._architecture.interleaved and part in self._heads:
            values = _in_halves(values, self._heads[part])
        if self._architecture.offset and part.endswith("norm"):
            values = values.astype(np.float32) - np.float32(self._architecture.offset)
        check_tensor(f"{self._file.path}: tensor {stored!r}", values)
        return values

    @property
    def quantised(self) -> Mapping[str, int]:
        """How many tensors are of each quantised type."""
        kinds = Counter(self._file.tensors[stored].kind for stored in self._in_file.values())
        return {kind: count for kind, count in kinds.items() if kind not in (*FLOATS, "BF16")}

    def _names(self) -> Iterator[tuple[str, str]]:
        """(name of transformers, name in the file) of every tensor."""
        for stored in self._file.tensors:
            if stored == ROPE_FACTORS:
                continue
            found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored)
            layer, part, ending = found.groups() if found else (None, "", "")
            known = ROOT.get(part) if layer is None else self._architecture.layer.get(part)
            fix = f"is not part of the architecture {self._file.architecture!r}; use the Hugging Face folder"
            require(known is not None, f"{self._file.path}: tensor", stored, fix)
            yield f"{known}.{ending}" if layer is None else f"model.layers.{layer}.{known}.{ending}", stored


def _in_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """[heads x size, ...] with the two halves of every head after each other, from neighbours in turns."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)

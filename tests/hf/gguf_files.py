"""GGUF files of small models as llama.cpp's converter would write them, by the `gguf` package."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma2": "GEMMA2", "gemma": "GEMMA"}
ARCHITECTURES |= {"gemma3": "GEMMA3"}
SHIFTED = ("gemma", "gemma2", "gemma3")  # 1 is added to the scales of their norms
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def write(
    path: Path,
    architecture: str,
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    *,
    kinds: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
    general: Mapping[str, Any] | None = None,
) -> None:
    """Writes a file.

    Args:
      path: of the file.
      architecture: a key of `ARCHITECTURES`.
      weights: by the names of transformers.
      config: config.json of the model.
      tokenizer: metadata below tokenizer.ggml.
      kinds: types of tensors by a part of their names; F32 otherwise.
      more: further metadata below the architecture's name.
      general: further metadata.
    """
    import gguf

    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    ropes = config["rope_parameters"]  # Gemma 3 has one for each kind of layer
    rope = ropes.get("full_attention", ropes)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    for key, value in (more or {}).items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in (general or {}).items():
        _add(writer, key, value)
    for key, value in tokenizer.items():
        _add(writer, f"tokenizer.{'' if key.startswith('chat') else 'ggml.'}{key}", value)

    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_dim))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[architecture]], layers)
    for name, values in weights.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            count = heads if "q_proj" in name else kv_heads
            halves = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if architecture in SHIFTED and "norm" in name:
            values = values + 1
        kind = next((kind for part, kind in (kinds or {}).items() if part in name), "F32")
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        _add_tensor(writer, stored, np.ascontiguousarray(values, np.float32), gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, Sequence) and not isinstance(value, str) else add[type(value)])(
        key, value
    )


def _add_tensor(writer: Any, name: str, values: np.ndarray, kind: Any) -> None:
    """Adds a tensor; of types that `gguf` cannot quantise the blocks are drawn, with scales of a size."""
    import gguf

    if kind.name == "F32":
        writer.add_tensor(name, values)
        return
    if not kind.name.endswith("_K"):
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=None if kind.name == "F16" else kind)
        return
    size, count = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (values.size // size, count), np.uint8)
    scales = {"Q4_K": slice(0, 4), "Q6_K": slice(count - 2, count)}[kind.name]
    blocks[:, scales] = np.full(blocks[:, scales].shape[1] // 2, 0.01, np.float16).view(np.uint8)
    writer.add_tensor(name, blocks.reshape(values.shape[0], -1), raw_dtype=kind)


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What Llama 3 divides each frequency by, spelled out as in its paper's code."""
    factors = []
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    for i in range(0, head_dim, 2):
        turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** (-i / head_dim) / (2 * np.pi)
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def byte_level(tokens: Mapping[str, int], merges: Sequence[Sequence[str]], pre: str | None) -> dict[str, Any]:
    """Metadata of a byte-level BPE tokenizer with three tokens of control and one of the user at its end."""
    own = sorted(tokens, key=lambda token: tokens[token])
    listed = [*own, "<s>", "</s>", "<|turn|>", "<think>"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": listed,
        "token_type": [1] * len(own) + [3, 3, 3, 4],
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": len(own),
        "eos_token_id": len(own) + 1,
        "eot_token_id": len(own) + 2,
        "chat_template": TEMPLATE,
    }


def sentencepiece(words: Sequence[str]) -> dict[str, Any]:
    """Metadata of a SentencePiece tokenizer whose pieces are the beginnings of words, short ones first."""
    pieces = dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1))
    letters = sorted({letter for word in words for letter in word})
    learned = sorted(pieces, key=len)
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *learned, *letters]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(learned) + len(letters))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "chat_template": TEMPLATE,
    }

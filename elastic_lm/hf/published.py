"""Shapes that models were published with, as entries of their config.json: what a plan needs of a model.

No weights belong to them. All are in bfloat16, in which such models train and are served on accelerators.
"""

from typing import Any


def _llama(
    width: int, layers: int, heads: tuple[int, int], neurons: int, vocab: int = 32_000, **more: Any
) -> dict[str, Any]:
    """A Llama; `heads` are those of queries and of keys and values."""
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": neurons,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        **more,
    }


_LLAMA_3 = {"vocab": 128_256, "rope_theta": 500_000.0, "max_position_embeddings": 8192}

# Llama 2: arXiv 2307.09288. Llama 3: arXiv 2407.21783. TinyLlama: arXiv 2401.02385. SmolLM2: arXiv
# 2502.02737. BERT: arXiv 1810.04805. And the config.json files of the models on the Hub.
PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(
        576,
        30,
        (9, 3),
        1536,
        49_152,
        rope_theta=100_000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "tinyllama-1.1b": _llama(2048, 22, (32, 4), 5632, max_position_embeddings=2048),
    "llama-2-7b": _llama(4096, 32, (32, 32), 11_008),
    "llama-2-13b": _llama(5120, 40, (40, 40), 13_824),
    "llama-2-70b": _llama(8192, 80, (64, 8), 28_672),
    "llama-3-8b": _llama(4096, 32, (32, 8), 14_336, **_LLAMA_3),
    "llama-3-70b": _llama(8192, 80, (64, 8), 28_672, **_LLAMA_3),
    "bert-base": {
        "model_type": "bert",
        "vocab_size": 30_522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "torch_dtype": "bfloat16",
    },
}

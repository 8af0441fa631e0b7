"""Tiny random models of every family, made with transformers, and how we compare with them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elastic_lm import hf
from elastic_lm.config.model import ModelConfig
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.registry import abstract_params

TOLERANCE = 1e-4  # of the largest logit, in float32
SHAPE = (2, 12)  # tokens; longer than every window below

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEO_SIZES = {"vocab_size": 48, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
PLAIN_SIZES = {key: SIZES[key] for key in SIZES if key != "intermediate_size"}
BLOOM_SIZES = {"vocab_size": 48, "hidden_size": 32, "n_layer": 2, "n_head": 4}
OWN_SIZES: dict[str, dict[str, Any]] = {  # of families with other names for sizes than SIZES
    "bloom": BLOOM_SIZES,
    "falcon": PLAIN_SIZES,
    "opt": PLAIN_SIZES,
    "gpt2": GPT2_SIZES,
    "gpt_bigcode": GPT2_SIZES,
    "gpt_neo": {**NEO_SIZES, "max_position_embeddings": 64},
    "gptj": GPT2_SIZES,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


SMALL = {"hidden_size": 16, "num_key_value_heads": 2, "pad_token_id": None}
LAYERED = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.5, 3.0, 8.0],
}

# The form of each family that its golden file records.
GOLDEN: dict[str, dict[str, Any]] = {
    "bloom": {},
    "falcon": {"ffn_hidden_size": 40},  # 7B's form
    "gpt_bigcode": {"n_inner": 40},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5, "intermediate_size": 40},
    "gptj": {"rotary_dim": 4, "n_inner": 40},
    "opt": {"ffn_dim": 40},
    "phi": _rope("default", partial_rotary_factor=0.5),
    "stablelm": {"num_key_value_heads": 2, "use_parallel_residual": True, "use_qkv_bias": True},
    "starcoder2": {"num_key_value_heads": 2, "sliding_window": 5},
    "llama": {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "eos_token_id": [3, 5]},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5, "head_dim": 8},
    "qwen2": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "eos_token_id": 7,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "pad_token_id": None,
    },
    "gpt2": {"bos_token_id": 1, "eos_token_id": 1, "n_inner": 40},
    "gpt_neox": _rope("default", partial_rotary_factor=0.25),
    "nemotron": {"num_key_value_heads": 2, "head_dim": 12},
    "gemma": {**SMALL, "head_dim": 8},
    "gemma3_text": {
        **SMALL,
        **LAYERED,
        "head_dim": 8,
        "query_pre_attn_scalar": 10,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "smollm3": {
        **SMALL,
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "olmo2": SMALL,
    "olmo3": {
        **SMALL,
        **LAYERED,
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "phi3": {
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "sliding_window": 5,
        "original_max_position_embeddings": 40,
        "rope_parameters": LONGROPE,
    },
    "granite": {
        **SMALL,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.3,
        "logits_scaling": 1.7,
    },
    "cohere": {**SMALL, "logit_scale": 0.3},
    "cohere2": {**SMALL, **LAYERED, "logit_scale": 0.3, **_rope("default")},
    "arcee": SMALL,
    "ernie4_5": {**SMALL, "head_dim": 8, "use_bias": True},
    "seed_oss": {**SMALL, "head_dim": 8},
    "helium": {**SMALL, "head_dim": 4, "attention_bias": True},
    "ministral": {**SMALL, **LAYERED, "head_dim": 4},
    "ministral3": {
        **SMALL,
        "head_dim": 8,
        "rope_parameters": {
            **YARN,
            "original_max_position_embeddings": 4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        },
    },
}
TOKENS = {"phi3": (1, 48)}  # of golden files that need others than SHAPE

# Further forms, compared where transformers is installed: name -> (model_type, changes to GOLDEN).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom-untied": ("bloom", {"n_head": 8, "n_layer": 3, "tie_word_embeddings": False}),
    "bloom-six-heads": ("bloom", {"n_head": 6, "hidden_size": 48}),
    "falcon-grouped": (  # 40B's form
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    ),
    "falcon-grouped-one-norm": (  # 11B's form
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-alibi": (  # RW-1B's form
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_attention_heads": 8},
    ),
    "falcon-alibi-32": (  # as many heads as RW-1B has
        "falcon",
        {
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "num_attention_heads": 32,
            "hidden_size": 128,
        },
    ),
    "falcon-multi-head": ("falcon", {"multi_query": False, "activation": "gelu_new", "bias": True}),
    "gpt_bigcode-multi-head": ("gpt_bigcode", {"multi_query": False, "tie_word_embeddings": False}),
    "gpt_neo-untied": (
        "gpt_neo",
        {"attention_types": [[["local"], 2]], "tie_word_embeddings": False, "intermediate_size": None},
    ),
    "gpt_neo-global": ("gpt_neo", {"attention_types": [[["global"], 2]], "activation_function": "relu"}),
    "gptj-whole": ("gptj", {"rotary_dim": 8, "n_inner": None, "activation_function": "gelu"}),
    "gptj-odd": ("gptj", {"rotary_dim": 2, "n_embd": 28}),
    "opt-no-biases": ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    "opt-untied": ("opt", {"tie_word_embeddings": False}),
    "phi-grouped": (
        "phi",
        {"num_key_value_heads": 2, **_rope("linear", factor=2.0, partial_rotary_factor=0.25)},
    ),
    "stablelm-sequential": (
        "stablelm",
        {"use_parallel_residual": False, "use_qkv_bias": False, "tie_word_embeddings": True},
    ),
    "starcoder2-no-biases": (
        "starcoder2",
        {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False},
    ),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-head_dim": ("llama", {"head_dim": 12, "num_key_value_heads": 1, **_rope("default")}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-linear": ("llama", _rope("linear", factor=2.5)),
    "llama-dynamic": ("llama", _rope("dynamic", factor=2.0)),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False}},
    ),
    "llama-yarn-factor": (
        "llama",
        {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 20.0, "beta_slow": 2.0}},
    ),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": None}),
    "qwen2-full": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen2-yarn": (
        "qwen2",
        {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": YARN},
    ),
    "qwen3-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "attention_bias": True},
    ),
    "gemma2-plain": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": None, "scale_attn_weights": False}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu"}),
    "gpt_neox-sequential": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
    ),
    "gpt_neox-linear": ("gpt_neox", _rope("linear", factor=2.0, partial_rotary_factor=1.0)),
    "gpt_neox-tied": ("gpt_neox", {"tie_word_embeddings": True}),
    "nemotron-biases": (
        "nemotron",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "head_dim": 8},
    ),
    "nemotron-whole": ("nemotron", _rope("linear", factor=2.0, partial_rotary_factor=1.0)),
    "gemma-untied": (
        "gemma",
        {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 1},
    ),
    "gemma3_text-plain": (
        "gemma3_text",
        {
            "final_logit_softcapping": None,
            "attention_bias": True,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3_text-default": (
        "gemma3_text",
        {"num_hidden_layers": 7, "layer_types": None, "rope_parameters": None},
    ),
    "smollm3-default": (
        "smollm3",
        {
            "num_hidden_layers": 5,
            "no_rope_layers": None,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "olmo2-biases": (
        "olmo2",
        {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "olmo3-default": ("olmo3", {"num_hidden_layers": 4, "layer_types": None, "rope_parameters": None}),
    "phi3-long": ("phi3", {"original_max_position_embeddings": 8}),
    "phi3-boundary": ("phi3", {"original_max_position_embeddings": 12}),
    "phi3-attention": (
        "phi3",
        {
            "original_max_position_embeddings": 8,
            "rope_parameters": {**LONGROPE, "attention_factor": 1.3},
            "tie_word_embeddings": True,
        },
    ),
    "phi3-whole": ("phi3", {"sliding_window": None, **_rope("default")}),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True, "logits_scaling": 13.0}),
    "cohere-untied": (
        "cohere",
        {"tie_word_embeddings": False, "attention_bias": True, **_rope("linear", factor=2.0)},
    ),
    "cohere2-default": ("cohere2", {"num_hidden_layers": 5, "layer_types": None}),
    "arcee-biases": ("arcee", {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    "arcee-silu": ("arcee", {"hidden_act": "silu"}),
    "ernie4_5-plain": ("ernie4_5", {"use_bias": False, "tie_word_embeddings": False}),
    "seed_oss-biases": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "seed_oss-plain": ("seed_oss", {"attention_bias": False}),
    "helium-biases": ("helium", {"mlp_bias": True, "tie_word_embeddings": True}),
    "ministral-default": ("ministral", {"layer_types": None}),
    "ministral3-window": (
        "ministral3",
        {
            "sliding_window": 5,
            **_rope("default", llama_4_scaling_beta=0.3, original_max_position_embeddings=4),
        },
    ),
}


# How transformers computes attention. Its eager form adds Falcon's ALiBi twice.
ATTENTION = {"falcon": "sdpa"}


def random_model(model_type: str, changes: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model of GOLDEN[model_type] | changes whose every weight is drawn at random.

    Tests that ask for one are skipped where there is no torch or no transformers.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = OWN_SIZES.get(model_type, SIZES)
    values = {"bos_token_id": 1, "eos_token_id": 2, **sizes, **GOLDEN[model_type], **changes}
    # Some config classes fill in the mapping they are given.
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    config = AutoConfig.for_model(model_type, **values)
    generator = torch.Generator().manual_seed(seed)
    attention = ATTENTION.get(model_type, "eager")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def load_theirs(folder: Path, dtype: str = "float32") -> Any:
    """Loads a folder with transformers and checks that it found every weight and no other."""
    import torch
    from transformers import AutoModelForCausalLM

    attention = ATTENTION.get(json.loads((folder / "config.json").read_text())["model_type"], "eager")
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention, output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V] float32 logits of a transformers model."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def our_logits(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V] float32 logits of our decoder, run operation by operation (no long compilation)."""
    return np.asarray(Decoder(config).bind({"params": params})(tokens).logits)


def random_ids(vocab_size: int, shape: tuple[int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """Uniform int64 token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest of their magnitudes."""
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def assert_same_model(a: tuple[ModelConfig, Params], b: tuple[ModelConfig, Params]) -> None:
    """Checks that two loaded models are equal, bit by bit."""
    assert dataclasses.asdict(a[0]) == dataclasses.asdict(b[0])
    assert jax.tree.structure(a[1]) == jax.tree.structure(b[1])
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a[1]), jax.tree.leaves(b[1]), strict=True):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Canonical parameters drawn with numpy, without compiling anything."""
    draw = np.random.default_rng(seed).standard_normal
    shapes = nn.unbox(abstract_params(config))
    return jax.tree.map(lambda leaf: jnp.asarray(0.25 * draw(leaf.shape), leaf.dtype), shapes)


def export_and_reload(config: ModelConfig, params: Params, folder: Path, **options: Any) -> Any:
    """Exports, checks that re-import is bit-exact, and returns what transformers loads."""
    hf.export(config, params, folder, **options)
    assert_same_model((config, params), hf.load(folder, dtype=config.param_dtype))
    return load_theirs(folder, config.param_dtype)


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes entries of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes a folder's tensors, in place or by the dictionary that `change` returns."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    changed = change(weights)
    path.unlink()
    save_file(changed if isinstance(changed, dict) else weights, path)

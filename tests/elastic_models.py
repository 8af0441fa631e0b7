"""Tiny models of every kind for the tests of widths, and how their logits are compared."""

from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.rope import RopeConfig
from elastic_lm.models.decoder import Params
from elastic_lm.testing import all_logits, random_params, random_tokens, tiny_config

TOLERANCE = 2e-6  # of the largest logit, in float32
EXITS = (ExitConfig(1, "mlp", gate=4), ExitConfig(2, "block"))
WITH_EXITS = ("llama", "gemma", "phi", "of many sizes")
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"elastic_groups": 8, "n_layers": 3},
    "plain order": {"windows": (0, 4)},
    "gemma": {
        "elastic_groups": 8,
        "tied": True,
        "sandwich_norm": True,
        "norm_offset": 1.0,
        "embed_scale": 2.0,
        "final_softcap": 5.0,
    },
    "gpt2": {"norm": "layernorm", "gated": False, "position": "learned", "n_kv_heads": 8, **BIASES},
    "neox": {"elastic_groups": 8, "norm": "layernorm", "parallel_residual": True, "gated": False, **BIASES},
    "phi": {
        "elastic_groups": 8,
        "norm": "layernorm",
        "parallel_residual": True,
        "shared_norm": True,
        "gated": False,
        "mlp_bias": True,
        "head_bias": True,
        "embed_norm": True,  # this and the next two as in no Phi
        "position": "learned",
        "position_offset": 2,
    },
    "nemotron": {"norm": "layernorm", "norm_offset": 1.0, "activation": "relu2", "gated": False},
    "layernorm sandwich": {"norm": "layernorm", "norm_offset": 1.0, "sandwich_norm": True},
    "qwen3": {"elastic_groups": 8, "qk_norm": True},
    "cohere": {
        "elastic_groups": 8,
        "norm": "layernorm",
        "norm_bias": False,
        "parallel_residual": True,
        "shared_norm": True,
        "residual_scale": 0.5,
        "logit_scale": 0.5,
        "windows": (0, 4),
        "rotated": (False, True),
        "rope": RopeConfig(interleaved=True),
    },
    "of many sizes": {
        "elastic_groups": 8,
        "n_layers": 3,
        "layer_mlp": (64, 32, 16),
        "layer_heads": (8, 4, 6),
        "layer_kv_heads": (2, 1, 2),
    },
}


def make(name: str, exits: tuple[ExitConfig, ...] = (), **changes: Any) -> tuple[ModelConfig, Params]:
    """A tiny model (2 layers, 8 heads in 2 groups, 64 neurons) whose every weight is random."""
    fields = {"n_layers": 2, "n_heads": 8, "head_dim": 4, **MODELS[name], **changes}
    config = tiny_config(**fields).with_exits(exits)
    return config, random_params(config)


def logits(config: ModelConfig, params: Params) -> dict[int, jax.Array]:
    return all_logits(config, params, random_tokens(config, 2, 9))


def assert_close(found: jax.Array, expected: jax.Array) -> None:
    assert float(jnp.max(jnp.abs(expected))) > 0.1
    assert float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected))) < TOLERANCE

"""A sub-network is the same model cut out, masked, or switched on."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.config import ExitConfig, ModelConfig
from elastic_lm.elastic import Menu, Subnet
from elastic_lm.models.decoder import Decoder, Params, abstract_params, stack_layers
from elastic_lm.models.elastic import Choice, elastic_taps
from elastic_lm.sharding import make_mesh, param_shardings, replicated
from elastic_lm.slicing import mask_params, slice_params, sliced_config
from elastic_lm.testing import all_logits, assert_same_tree, random_tokens, tiny_config

EXITS = (ExitConfig(1, "mlp", gate=4), ExitConfig(2, "block"), ExitConfig(3, "norm", tied=True))
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"elastic_groups": 8},
    "plain order": {"windows": (0, 4, 0, 4)},
    "tied gemma": {
        "elastic_groups": 8,
        "tied": True,
        "sandwich_norm": True,
        "norm_offset": 1.0,
        "embed_scale": 2.0,
        "attn_softcap": 3.0,
        "final_softcap": 5.0,
        "activation": "gelu_tanh",
    },
    "gpt2": {
        "elastic_groups": 4,
        "norm": "layernorm",
        "gated": False,
        "position": "learned",
        "n_kv_heads": 8,
        **BIASES,
    },
    "neox": {"elastic_groups": 8, "norm": "layernorm", "parallel_residual": True, "gated": False, **BIASES},
    "nemotron": {"norm": "layernorm", "norm_offset": 1.0, "activation": "relu2", "gated": False},
    "layernorm sandwich": {"norm": "layernorm", "norm_offset": 1.0, "sandwich_norm": True},
    "qwen3": {"elastic_groups": 8, "qk_norm": True},
    "of many sizes": {
        "elastic_groups": 8,
        "layer_mlp": (64, 32, 64, 16),
        "layer_heads": (8, 4, 4, 6),
        "layer_kv_heads": (2, 2, 1, 2),
    },
}


def make(name: str, exits: tuple[ExitConfig, ...] = EXITS) -> tuple[ModelConfig, Params]:
    """A tiny model (4 layers, 8 heads in 2 groups, 64 neurons) whose every weight is random."""
    fields = {"n_heads": 8, "head_dim": 4, **MODELS[name]}
    config = tiny_config(**fields).with_exits(exits)
    draw = np.random.default_rng(0).standard_normal
    shapes = jax.tree.map(
        lambda box: box.value, abstract_params(config), is_leaf=lambda x: hasattr(x, "value")
    )
    return config, jax.tree.map(lambda x: jnp.asarray(0.3 * draw(x.shape), x.dtype), shapes)


def random_subnet(config: ModelConfig, seed: int, *, whole: bool = False) -> Subnet:
    """Any sizes that fit; `whole` keeps all groups and channels."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, config.n_layers + 1))
    layers = tuple(sorted(rng.choice(config.n_layers, count, replace=False).tolist()))
    unit = config.elastic_groups or 1
    sizes = [config.sizes(i) for i in layers]
    return Subnet(
        layers,
        tuple(unit * int(rng.integers(1, f // unit + 1)) for f, _, _ in sizes),
        tuple(int(rng.integers(1, n // k + 1)) for _, n, k in sizes),
        tuple(k if whole else int(rng.integers(1, k + 1)) for _, _, k in sizes),
        config.d_model if whole else unit * int(rng.integers(1, config.d_model // unit + 1)),
    )


def logits(config: ModelConfig, params: Params) -> dict[int, jax.Array]:
    return all_logits(config, params, random_tokens(config, 2, 9))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_a_slice_computes_what_the_mask_computes(name: str, seed: int) -> None:
    config, params = make(name)
    subnet = random_subnet(config, seed)
    small, large = logits(*slice_params(config, params, subnet)), logits(*mask_params(config, params, subnet))
    kept = [e.layer for e in config.exits if e.layer - 1 in subnet.layers and e.layer < config.n_layers]
    assert len(small) == len(kept) + 1
    for before in kept:
        after = subnet.layers.index(before - 1) + 1
        np.testing.assert_allclose(small[after], large[before], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(small[len(subnet.layers)], large[config.n_layers], rtol=1e-5, atol=2e-6)
    assert float(jnp.max(jnp.abs(large[config.n_layers]))) > 0.1

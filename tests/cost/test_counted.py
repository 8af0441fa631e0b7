"""Counted costs equal the arrays that models are made of, and known sizes of known models."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from elastic_models import EXITS, MODELS, WITH_EXITS, make

from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.cost.counted import Workload, counted_table, model_cost
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import abstract_params
from elastic_lm.testing import tiny_config
from elastic_lm.width.slicing import slice_params

LLAMA_7B = ModelConfig(32000, d_model=4096, n_layers=32, n_heads=32, d_mlp=11008)
KNOWN = {
    "LLaMA-7B": (LLAMA_7B, 6_738_415_616),
    "Llama-3.1-8B": (
        ModelConfig(128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_mlp=14336),
        8_030_261_248,
    ),
    "Mistral-7B": (
        ModelConfig(32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_mlp=14336),
        7_241_732_096,
    ),
    "Qwen3-8B": (
        ModelConfig(
            151936,
            d_model=4096,
            n_layers=36,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            d_mlp=12288,
            qk_norm=True,
        ),
        8_190_735_360,
    ),
    "Gemma-2-2B": (
        ModelConfig(
            256000,
            d_model=2304,
            n_layers=26,
            n_heads=8,
            n_kv_heads=4,
            head_dim=256,
            d_mlp=9216,
            sandwich_norm=True,
            tied=True,
        ),
        2_614_341_888,
    ),
    "GPT-2": (
        ModelConfig(
            50257,
            d_model=768,
            n_layers=12,
            n_heads=12,
            d_mlp=3072,
            max_len=1024,
            norm="layernorm",
            gated=False,
            position="learned",
            tied=True,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
        ),
        124_439_808,
    ),
    "Pythia-70M": (
        ModelConfig(
            50304,
            d_model=512,
            n_layers=6,
            n_heads=8,
            d_mlp=2048,
            norm="layernorm",
            gated=False,
            parallel_residual=True,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
        ),
        70_426_624,
    ),
}


def heads(name: str) -> tuple[float, ...]:
    """Shares that every layer of a model has heads for."""
    return (1.0,) if name in ("gpt2", "of many sizes") else (0.5, 1.0)


def stored(config: ModelConfig) -> int:
    """Numbers in the arrays of a model, none of which is made."""
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(abstract_params(config))))


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_their_known_sizes(name: str) -> None:
    config, parameters = KNOWN[name]
    assert model_cost(config).parameters == parameters == stored(config)


def test_a_fifth_of_llama_pruned_in_its_middle_layers() -> None:
    """LLM-Pruner's 20 %: a quarter of the heads and neurons of layers 4 to 29 (arXiv 2305.11627)."""
    cut = [4 <= i < 30 for i in range(32)]
    subnet = Subnet(
        tuple(range(32)),
        tuple(8256 if c else 11008 for c in cut),
        (1,) * 32,
        tuple(24 if c else 32 for c in cut),
        4096,
    )
    assert model_cost(subnet.sliced(LLAMA_7B)).parameters == 5_422_977_024


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_bytes_are_those_of_the_arrays(name: str) -> None:
    config, params = make(name, EXITS if name in WITH_EXITS else ())
    for subnet in (Subnet.full(config), Menu(mlp=(0.5, 1.0), heads=heads(name)).smallest(config)):
        small, own = slice_params(config, params, subnet)
        cost = model_cost(small)
        assert cost.parameters == sum(leaf.size for leaf in jax.tree.leaves(own))
        assert cost.memory_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_are_those_of_the_arrays(dtype: str) -> None:
    exits = (ExitConfig(1, "block"), ExitConfig(2, "norm"))
    sizes = {"layer_heads": (4, 2, 4, 2), "layer_kv_heads": (2, 1, 2, 1)}
    config = tiny_config(dtype=dtype, head_dim=8, **sizes).with_exits(exits)
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), nn.unbox(abstract_params(config)))
    sampler = Sampler(Decoder(config), params)
    _, state, _ = sampler._prefill(sampler._call([[1, 2, 3]] * 3), 5)
    arrays = jax.tree.leaves((state.cache, state.exit_cache))
    capacity = arrays[0].shape[2]
    held = (
        model_cost(config, Workload(batch=3, context=capacity)).memory_bytes - model_cost(config).memory_bytes
    )
    assert held * (state.length.shape[0] // 3) == sum(a.nbytes for a in arrays)


def test_flops_are_two_per_weight_and_four_per_head_channel_and_key() -> None:
    config = tiny_config(n_layers=3, windows=(0, 4, 100))
    shapes = nn.unbox(abstract_params(config))
    kernels = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if path[-1].key == "kernel" and "layers_" in path[0].key
    ]
    seen = 10 + 4 + 10  # keys, the newest one's among them
    expected = 2 * (sum(kernels) + config.vocab_size * config.d_model) + 4 * config.d_model * seen
    assert model_cost(config, Workload(context=9)).flops == expected
    assert model_cost(config, Workload(batch=5, context=9)).flops == 5 * expected


def test_a_step_reads_weights_once_and_every_cache() -> None:
    config = tiny_config(dtype="bfloat16")
    weights = (stored(config) - (config.vocab_size - 1) * config.d_model) * 4
    assert model_cost(config).read_bytes == weights
    cache = 2 * config.n_kv_heads * config.head_dim * config.n_layers * 2
    more = 2 * config.d_model * 4  # rows of the embedding
    assert model_cost(config, Workload(batch=3, context=7)).read_bytes == weights + more + 3 * 7 * cache


@pytest.mark.parametrize("kind", ["parameters", "flops", "memory_bytes"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "of many sizes"])
def test_table_totals_are_the_costs_of_slices(name: str, kind: str) -> None:
    config, _ = make(name, EXITS[:1] if name in WITH_EXITS else ())
    config = dataclasses.replace(config, dtype="bfloat16")
    menu = Menu(mlp=(0.5, 1.0), heads=heads(name), groups=(1.0,) if name == "of many sizes" else (0.5, 1.0))
    load = Workload(batch=2, context=11)
    table = counted_table(config, menu, kind, load)
    rng = np.random.default_rng(0)
    for subnet in [
        menu.smallest(config),
        menu.largest(config),
        *(menu.sample(config, rng) for _ in range(8)),
    ]:
        small = subnet.sliced(config.with_exits(()))
        assert table.total(config, menu, subnet) == getattr(model_cost(small, load), kind)


def test_least_and_greatest_are_those_of_all_subnets() -> None:
    config = tiny_config()
    menu = Menu(dropped=(2, 1))
    table = counted_table(config, menu, "parameters")
    least, most = table.range(menu)
    assert (
        least
        == table.total(config, menu, menu.smallest(config))
        == model_cost(menu.smallest(config).sliced(config)).parameters
    )
    assert most == model_cost(config).parameters
    table.check(Budget(parameters=least), menu)
    with pytest.raises(
        ValueError, match=r"budget.parameters=.*: the cheapest sub-network of this menu costs"
    ):
        table.check(Budget(parameters=least - 1), menu)
    with pytest.raises(ValueError, match="this table holds parameters"):
        table.check(Budget(flops=1e9), menu)


def test_what_is_not_counted_is_refused() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="latency is measured: elastic-lm latency build"):
        counted_table(config, Menu(), "latency_ms")
    with pytest.raises(ValueError, match=r"workload\.batch=0"):
        Workload(batch=0)
    with pytest.raises(ValueError, match=r"menu.d_model=\(0.5, 1.0\): a table holds costs at the model's"):
        counted_table(config, Menu(d_model=(0.5, 1.0)), "flops")
    table = counted_table(config, Menu(), "flops")
    with pytest.raises(ValueError, match="at the model's full width"):
        table.total(config, Menu(), Subnet.uniform(config, d_model=0.5))
    with pytest.raises(ValueError, match=r"subnet.mlp\[0\]=8: is not on the menu"):
        table.total(config, Menu(), Subnet.uniform(config, mlp=0.125))

"""A sub-network is the same model cut out, masked, or switched on."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.config import ExitConfig, ModelConfig
from elastic_lm.elastic import Menu, Subnet
from elastic_lm.methods.ee_tuning import attach_exits
from elastic_lm.models.decoder import Decoder, Params, default_positions, stack_layers
from elastic_lm.models.elastic import Choice, elastic_taps
from elastic_lm.sharding import make_mesh, param_shardings, replicated
from elastic_lm.slicing import mask_params, slice_params, sliced_config
from elastic_lm.testing import all_logits, assert_same_tree, random_params, random_tokens, tiny_config

TOLERANCE = 2e-6  # of the largest logit, in float32
EXITS = (ExitConfig(1, "mlp", gate=4), ExitConfig(2, "block"))
WITH_EXITS = ("llama", "gemma", "of many sizes")
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
    "nemotron": {"norm": "layernorm", "norm_offset": 1.0, "activation": "relu2", "gated": False},
    "layernorm sandwich": {"norm": "layernorm", "norm_offset": 1.0, "sandwich_norm": True},
    "qwen3": {"elastic_groups": 8, "qk_norm": True},
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


def random_subnet(config: ModelConfig, seed: int) -> Subnet:
    """Any sizes that fit."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, config.n_layers + 1))
    layers = tuple(sorted(rng.choice(config.n_layers, count, replace=False).tolist()))
    unit = config.elastic_groups or 4
    sizes = [config.sizes(i) for i in layers]
    return Subnet(
        layers,
        tuple(unit * int(rng.integers(1, f // unit + 1)) for f, _, _ in sizes),
        tuple(int(rng.integers(1, n // k + 1)) for _, n, k in sizes),
        tuple(int(rng.integers(1, k + 1)) for _, _, k in sizes),
        unit * int(rng.integers(2, config.d_model // unit + 1)),
    )


def logits(config: ModelConfig, params: Params) -> dict[int, jax.Array]:
    return all_logits(config, params, random_tokens(config, 2, 9))


def assert_close(found: jax.Array, expected: jax.Array) -> None:
    assert float(jnp.max(jnp.abs(expected))) > 0.1
    assert float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected))) < TOLERANCE


@pytest.mark.parametrize(("name", "seed"), [(n, 0) for n in MODELS] + [("llama", 1), ("of many sizes", 3)])
def test_a_slice_computes_what_the_mask_computes(name: str, seed: int) -> None:
    config, params = make(name, EXITS if name in WITH_EXITS else ())
    subnet = random_subnet(config, seed)
    small, large = logits(*slice_params(config, params, subnet)), logits(*mask_params(config, params, subnet))
    depth = {
        e.layer: subnet.layers.index(e.layer - 1) + 1 for e in config.exits if e.layer - 1 in subnet.layers
    }
    depth |= {config.n_layers: len(subnet.layers)}
    assert set(small) == set(depth.values())
    for before, after in depth.items():
        assert_close(small[after], large[before])


@pytest.mark.parametrize("name", ["llama", "of many sizes"])
def test_a_slice_of_a_slice_is_one_slice(name: str) -> None:
    config, params = make(name, EXITS)
    outer = random_subnet(config, 1)
    middle = slice_params(config, params, outer)
    inner = random_subnet(middle[0], 2)
    outer.compose(inner).check(config)
    twice, once = slice_params(*middle, inner), slice_params(config, params, outer.compose(inner))
    assert twice[0] == once[0]
    assert_same_tree(twice[1], once[1])


def test_the_full_subnet_copies_nothing() -> None:
    config, params = make("llama", EXITS)
    same_config, same = slice_params(config, params, Subnet.full(config))
    assert same_config == config
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))


def test_shapes_are_those_of_the_config() -> None:
    config, params = make("llama", EXITS)
    subnet = Subnet((0, 2), (16, 40), (3, 1), (2, 1), 24)
    small, found = el.slice_params(config, params, subnet)
    assert small == sliced_config(config, subnet)
    assert (small.layer_mlp, small.layer_heads, small.layer_kv_heads) == ((16, 40), (6, 1), (2, 1))
    assert [e.layer for e in small.exits] == [1]
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, random_params(small))


@pytest.mark.parametrize("stacked", [False, True])
def test_the_switch_computes_what_the_slice_computes(stacked: bool) -> None:
    """One program for all subnets, unrolled or scanned."""
    config, params = make("llama", windows=(0, 4, 0) if stacked else ())
    menu = Menu(mlp=(0.25, 0.5, 1.0), heads=(0.25, 0.75, 1.0), dropped=(1, 0))
    tokens = random_tokens(config, 2, 9)
    traces = []

    @jax.jit
    def switched(params: Params, choice: Choice) -> jax.Array:
        traces.append(1)
        decoder = Decoder(config).bind({"params": params})
        tap = elastic_taps(config, menu, params, tokens, choice, (1, 3), remat=stacked)[3]
        return decoder.final_logits(decoder.final_features(tap.hidden))

    rng = np.random.default_rng(0)
    subnets = [menu.largest(config), menu.smallest(config), menu.sample(config, rng)]
    held = stack_layers(params) if stacked else params
    for subnet in subnets:
        small = slice_params(config, params, subnet)
        expected = logits(*small)[small[0].n_layers]
        assert_close(switched(held, Choice.of(config, menu, subnet)), expected)
    assert len(traces) == 1


def test_the_switch_has_gradients_of_the_slice() -> None:
    config, params = make("llama", n_layers=2)
    menu, subnet = Menu(mlp=(0.5, 1.0)), Subnet((0, 1), (32, 64), (2, 4), (2, 2), 32)
    choice, tokens = Choice.of(config, menu, subnet), random_tokens(config, 2, 5)

    def switched(params: Params) -> jax.Array:
        return jnp.sum(elastic_taps(config, menu, params, tokens, choice)[2].hidden ** 2)

    def sliced(params: Params) -> jax.Array:
        small, cut = slice_params(config, params, subnet)
        return jnp.sum(Decoder(small).bind({"params": cut}).taps(tokens, (2,))[2].hidden ** 2)

    found, expected = jax.jit(jax.grad(switched))(params), jax.jit(jax.grad(sliced))(params)
    for name in ("embed", "layers_0", "layers_1"):
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(b)) + 1e-6))


class Alternating:
    """Every second token leaves at the first exit."""

    metric = "max_prob"
    thresholds = (0.0,)

    def check(self, config: ModelConfig) -> None:
        """Fits every model."""

    def schedule(self, count: int) -> np.ndarray:
        """0 = leaves, 2 = never."""
        return 2.0 * (np.arange(count) % 2)[None]


def test_decoding_with_layers_of_many_sizes_equals_recomputation() -> None:
    config, params = make("llama", EXITS[:1], n_layers=2)
    subnet = Subnet((0, 1), (16, 64), (3, 1), (2, 1), 32)
    small, cut = slice_params(config, jax.tree.map(lambda x: 2 * x, params), subnet)
    prompts = [[5, 9, 2], [7, 1, 33, 60, 2, 8]]
    outputs = el.Sampler(Decoder(small), cut, exit=Alternating(), window=2).sample(
        prompts, 6, ignore_eos=True
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.exit_layers == [1, 2, 1, 2, 1, 2]
        tokens = list(prompt)
        for depth in output.exit_layers:
            padded = np.zeros((1, 12), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(jnp.argmax(all_logits(small, cut, padded)[depth][0, len(tokens) - 1])))
        assert output.tokens == tokens[len(prompt) :]


def test_what_does_not_fit_is_refused() -> None:
    config, params = make("llama")
    subnet = Subnet((0, 1), (16, 64), (4, 4), (2, 2), 32)
    small, cut = slice_params(config, params, subnet)
    with pytest.raises(ValueError, match="layers 0 and 1 differ in size"):
        stack_layers(cut)
    with pytest.raises(ValueError, match="unstack_layers"):
        slice_params(config, stack_layers(params), subnet)
    with pytest.raises(ValueError, match=r"subnet.mlp\[0\]=12: must be a multiple of elastic_groups=8"):
        slice_params(config, params, Subnet((0,), (12,), (4,), (2,), 32))
    with pytest.raises(ValueError, match=r"exit.init='copy': layer 1 has sizes \(16, 8, 2\)"):
        attach_exits(small, cut, (ExitConfig(1, "block"),), jax.random.key(0))


COLLECTIVES = "all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter"


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("fsdp", [1, 2])
def test_mesh_slices_move_no_data(fsdp: int) -> None:
    """Under tensor parallelism a narrower model needs the collectives of the whole one and no other."""
    config, params = make("llama", n_kv_heads=4, n_heads=16)
    mesh = make_mesh(1, fsdp, 4, devices=jax.devices()[: 4 * fsdp])
    placed = jax.device_put(params, param_shardings(config, mesh))
    hidden = np.random.default_rng(0).normal(size=(2, 9, config.d_model)).astype(np.float32)
    there = jax.device_put(hidden, replicated(mesh))
    menu = Menu(heads=(0.25, 0.5, 1.0))

    def layers(subnet: Subnet, params: Params, hidden: jax.Array) -> jax.Array:
        small, cut = slice_params(config, params, subnet)
        decoder = Decoder(small).bind({"params": cut})
        tap, _ = decoder.run_layers(hidden, default_positions(hidden, None), 0, small.n_layers)
        return tap.hidden

    def moved(subnet: Subnet) -> dict[str, int]:
        run = jax.jit(layers, static_argnums=0)
        np.testing.assert_allclose(
            run(subnet, placed, there), layers(subnet, params, hidden), rtol=1e-4, atol=1e-4
        )
        program = run.lower(subnet, placed, there).compile().as_text()
        found = re.findall(rf"= \S+ ({COLLECTIVES})(?:-start)?\(", program)
        return {name: found.count(name) for name in set(found)}

    whole = moved(Subnet.full(config))
    assert whole["all-reduce"] >= config.n_layers
    assert moved(Subnet.uniform(config, mlp=0.25, heads=0.5)) == whole
    assert moved(menu.sample(config, np.random.default_rng(0))) == whole

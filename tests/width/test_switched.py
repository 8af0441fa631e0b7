"""A sub-network chosen while the program runs, and decoding with layers of many sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from elastic_models import EXITS, assert_close, logits, make

import elastic_lm as el
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.models.decoder import Decoder, Params, stack_layers
from elastic_lm.nn.attention import AttentionContext, KeyValues, NewKeyValues
from elastic_lm.nn.block import Block, Tap
from elastic_lm.testing import all_logits, random_tokens
from elastic_lm.width.axes import edit_params, slice_edit
from elastic_lm.width.slicing import mask_params, slice_params
from elastic_lm.width.switched import MenuIndices, elastic_block, elastic_taps

GROUPS = (0.5, 1.0)
CASES = {
    "unrolled": ("llama", Menu((0.25, 0.5, 1.0), (0.25, 0.75, 1.0), GROUPS, dropped=(1, 0)), {}),
    "stacked": ("llama", Menu((0.25, 1.0), (0.25, 1.0), GROUPS, dropped=(1, 0)), {"windows": (0, 4, 0)}),
    "heads without groups": ("gpt2", Menu((0.5, 1.0), (1.0,), (0.25, 0.5, 1.0)), {}),
    "normalised heads": ("qwen3", Menu((0.5, 1.0), (0.5, 1.0), GROUPS), {}),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_switch_computes_what_slice_and_mask_compute(case: str) -> None:
    """One program for all subnets, unrolled or scanned."""
    name, menu, changes = CASES[case]
    config, params = make(name, **changes)
    depth, stacked = config.n_layers, case == "stacked"
    tokens = random_tokens(config, 2, 9)
    traces = []

    @jax.jit
    def switched(params: Params, choice: MenuIndices) -> jax.Array:
        traces.append(1)
        decoder = Decoder(config).bind({"params": params})
        tap = elastic_taps(config, menu, params, tokens, choice, (1, depth), remat=stacked)[depth]
        return decoder.final_logits(decoder.final_features(tap.hidden))

    rng = np.random.default_rng(0)
    subnets = [menu.largest(config), menu.smallest(config), menu.sample(config, rng)]
    held = stack_layers(params) if stacked else params
    for subnet in subnets:
        small = slice_params(config, params, subnet)
        found = switched(held, MenuIndices.of(config, menu, subnet))
        assert_close(found, logits(*small)[small[0].n_layers])
        assert_close(found, logits(*mask_params(config, params, subnet))[depth])
    assert len(traces) == 1


def test_the_switch_has_gradients_of_the_slice() -> None:
    config, params = make("llama", n_layers=2)
    menu, subnet = Menu(mlp=(0.5, 1.0), groups=GROUPS), Subnet((0, 1), (32, 64), (2, 4), (2, 1), 32)
    choice, tokens = MenuIndices.of(config, menu, subnet), random_tokens(config, 2, 5)

    def switched(params: Params) -> jax.Array:
        return jnp.sum(elastic_taps(config, menu, params, tokens, choice)[2].hidden ** 2)

    def sliced(params: Params) -> jax.Array:
        small, cut = slice_params(config, params, subnet)
        return jnp.sum(Decoder(small).bind({"params": cut}).taps(tokens, (2,))[2].hidden ** 2)

    found, expected = jax.jit(jax.grad(switched))(params), jax.jit(jax.grad(sliced))(params)
    for name in ("embed", "layers_0", "layers_1"):
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(b)) + 1e-6))


def test_a_choice_without_groups_has_all_of_them() -> None:
    config, params = make("llama", n_layers=2)
    menu, tokens = Menu(groups=GROUPS), random_tokens(config, 2, 5)
    whole = MenuIndices.of(config, menu, menu.largest(config))
    states = jax.jit(lambda choice: elastic_taps(config, menu, params, tokens, choice)[2].hidden)
    unsaid = MenuIndices(whole.mlp, whole.heads, whole.keep)
    np.testing.assert_allclose(states(unsaid), states(whole), rtol=1e-6)


def test_keys_and_values_keep_their_shape_and_extend_a_cache() -> None:
    """The layer reads the keys and values that it made itself, like the slice."""
    config, params = make("llama", n_layers=1)
    layer = params["layers_0"]
    edit = slice_edit(config, mlp=32, heads=2, kv_groups=1, d_model=config.d_model)
    small = dataclasses.replace(config, d_mlp=32, n_heads=2, n_kv_heads=1)
    x = jax.random.normal(jax.random.key(0), (2, 6, config.d_model))
    positions = jnp.tile(jnp.arange(6), (2, 1))
    block = jax.jit(
        lambda x: Block(small).apply({"params": edit_params(layer, edit)}, x, AttentionContext(positions))
    )
    expected = block(x)[0].hidden

    @jax.jit
    def step(
        i: jax.Array, x: jax.Array, positions: jax.Array, past: KeyValues | None
    ) -> tuple[Tap, NewKeyValues]:
        context, chosen = AttentionContext(positions, past=past), MenuIndices(i, i, jnp.bool_(True), i)
        choices = {"mlp": (32, 64), "heads": (2, 4), "kv_groups": (1, 2)}
        return elastic_block(config, layer, x, context, chosen, **choices)

    smallest = jnp.int32(0)
    first, (k, v) = step(smallest, x[:, :4], positions[:, :4], None)
    assert k.shape == v.shape == (2, 2, 4, config.head_dim)
    assert not jnp.any(k[:, 1])
    assert not jnp.any(v[:, 1])
    then, _ = step(smallest, x[:, 4:], positions[:, 4:], KeyValues(k, v, positions[:, :4]))
    assert_close(jnp.concatenate([first.hidden, then.hidden], axis=1), expected)


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

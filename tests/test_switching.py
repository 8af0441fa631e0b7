"""A sub-network chosen while the program runs, and decoding with layers of many sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from elastic_models import EXITS, assert_close, logits, make

import elastic_lm as el
from elastic_lm.config import ModelConfig
from elastic_lm.elastic import Menu, Subnet
from elastic_lm.models.decoder import Decoder, Params, stack_layers
from elastic_lm.models.elastic import Choice, elastic_taps
from elastic_lm.slicing import slice_params
from elastic_lm.testing import all_logits, random_tokens


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

"""Layers that rotate differently compute, stacked, switched, gated and nested, what they do one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from elastic_models import assert_close, make

from elastic_lm.config.model import ExitConfig
from elastic_lm.config.rope import RopeConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Decoder, Params, stack_layers
from elastic_lm.testing import random_tokens
from elastic_lm.width.gated import Picks, gated_hidden
from elastic_lm.width.importance import permute, rank
from elastic_lm.width.nested_decoder import WIDTH_INPUTS, NestedConfig, NestedDecoder, nested_params
from elastic_lm.width.slicing import mask_params, slice_params
from elastic_lm.width.switched import MenuIndices, elastic_taps

LAYERED = {
    "n_layers": 4,
    "windows": (3, 0, 5, 0),
    "rope": RopeConfig(theta=200.0, scaling="linear", factor=3.0),
    "local_rope": RopeConfig(theta=20.0),
    "rotated": (True, True, False, False),
}
WHOLE = {"qk_norm": True, "qk_norm_whole": True, "pre_norm": False, "sandwich_norm": True}
MENU = Menu((0.5, 1.0), (0.5, 1.0))
CASES = {"layered": (LAYERED, MENU), "heads as one": ({**LAYERED, **WHOLE}, Menu((0.5, 1.0), (1.0,)))}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.long
def test_every_form_of_a_layer_rotates_as_the_layer_does(case: str) -> None:
    fields, menu = CASES[case]
    config, params = make("qwen3", **fields)
    tokens = random_tokens(config, 2, 9)
    stacked = stack_layers(params)
    expected = Decoder(config).apply({"params": params}, tokens).logits

    # Layers that would all rotate by `rope` compute something else.
    plain = make("qwen3", **{**fields, "local_rope": None, "rotated": ()})[0]
    alike = Decoder(plain).apply({"params": params}, tokens).logits
    assert float(jnp.max(jnp.abs(alike - expected))) > 1e-2

    for remat in (False, True):
        found = Decoder(config, remat=remat).apply({"params": stacked}, tokens).logits
        assert_close(found, expected)

    def loss(params: Params, remat: bool) -> jax.Array:
        return jnp.mean(jnp.square(Decoder(config, remat=remat).apply({"params": params}, tokens).logits))

    one_by_one = stack_layers(jax.grad(loss)(params, False))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5),
        jax.grad(loss)(stacked, True),
        one_by_one,
    )

    def logits(hidden: jax.Array) -> jax.Array:
        decoder = Decoder(config).bind({"params": params})
        return decoder.final_logits(decoder.final_features(hidden))

    choice = MenuIndices.of(config, menu, menu.largest(config))
    for held in (params, stacked):
        taps = elastic_taps(config, menu, held, tokens, choice, remat=held is stacked)
        assert_close(logits(taps[config.n_layers].hidden), expected)

    last = [jax.nn.one_hot(jnp.full((2, 1), len(c) - 1), len(c)) for c in (menu.heads, menu.mlp)]
    keep = jnp.ones((config.n_layers, 2))
    hidden, _ = gated_hidden(
        config, menu, stacked, tokens, lambda given, hidden: Picks(*last), jnp.zeros(config.n_layers), keep
    )
    assert_close(logits(hidden), expected)

    nested = NestedConfig.of(config, menu, per_token=False)
    whole = {
        "heads": jnp.full((2, config.n_layers), len(menu.heads) - 1),
        "mlp": jnp.full((2, config.n_layers), 1),
    }
    own = {**nested_params(nested, params), WIDTH_INPUTS: whole}
    assert_close(NestedDecoder(nested).apply({"params": own}, tokens).logits, expected)


@pytest.mark.parametrize("case", sorted(CASES))
def test_slices_rotate_like_the_layers_they_keep(case: str) -> None:
    config, params = make("qwen3", **CASES[case][0])
    heads = 4 if case == "heads as one" else 2
    subnet = Subnet((0, 2, 3), (32, 64, 16), (heads,) * 3, (2,) * 3, config.d_model)
    small, cut = slice_params(config, params, subnet)
    assert [small.rope_of(i) for i in range(3)] == [config.rope_of(i) for i in subnet.layers]
    tokens = random_tokens(config, 2, 9)
    found = Decoder(small).apply({"params": cut}, tokens).logits
    large, masked = mask_params(config, params, subnet)
    assert_close(found, Decoder(large).apply({"params": masked}, tokens).logits)


def test_heads_that_are_normalised_together_are_not_cut() -> None:
    config, params = make("qwen3", **WHOLE)
    fix = r"qk_norm_whole=True normalises all heads of a layer at once; keep 4, and cut neurons"
    with pytest.raises(ValueError, match=rf"subnet\.heads\[0\]=2: {fix}"):
        slice_params(config, params, Subnet.uniform(config, heads=0.5))
    with pytest.raises(ValueError, match=r"subnet\.groups\[0\]=1"):
        slice_params(config, params, Subnet.uniform(config, groups=0.5))
    with pytest.raises(ValueError, match=r"menu\.heads=0\.5"):
        MENU.sizes(config)

    # Ranking leaves their order as it is, and changes no output.
    tokens = random_tokens(config, 2, 9)
    ones = jnp.ones(tokens.shape, jnp.int32)
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (2, 1))
    importance = rank(config, params, [Batch(tokens, tokens, jnp.ones(tokens.shape), positions, ones)])
    new, ranked = permute(config, params, importance)
    expected = Decoder(config).apply({"params": params}, tokens).logits
    assert_close(Decoder(new).apply({"params": ranked}, tokens).logits, expected)


def test_an_exits_own_block_rotates_like_the_last_layer() -> None:
    exits = (ExitConfig(1, "block"),)
    config, params = make("llama", exits, **LAYERED)
    assert (config.rope_of(0), config.rope_of(3)) == (LAYERED["local_rope"], None)
    tokens = random_tokens(config, 1, 9)

    # Without rotation, a block that sees all tokens does not know their order.
    decoder = Decoder(config).bind({"params": params})
    tap = decoder.taps(tokens, (1,))[1]
    order = np.asarray([7, 6, 5, 4, 3, 2, 1, 0, 8])
    moved = jax.tree.map(lambda x: x[:, order], tap)
    found, same = (decoder.exit_features(0, t)[:, -1] for t in (tap, moved))
    assert_close(found, same)

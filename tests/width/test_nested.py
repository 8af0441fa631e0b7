"""Nested blocks compute for every token what its slice computes, whatever the other tokens choose."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from elastic_models import MODELS, assert_close, make

from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.models.decoder import Decoder
from elastic_lm.testing import random_tokens
from elastic_lm.width.nested_decoder import (
    WIDTH_INPUTS,
    NestedConfig,
    NestedDecoder,
    nested_params,
    prompt_choices,
)
from elastic_lm.width.router import budget_code
from elastic_lm.width.slicing import slice_params


def menu_of(name: str) -> Menu:
    sizes = [make(name)[0].sizes(i) for i in range(make(name)[0].n_layers)]
    halves = all(heads // groups % 2 == 0 for _, heads, groups in sizes)
    return Menu((0.5, 1.0), (0.5, 1.0) if halves else (1.0,))


@pytest.mark.parametrize("name", list(MODELS))
def test_a_row_of_choices_is_a_slice(name: str) -> None:
    config, params = make(name)
    menu, rng = menu_of(name), np.random.default_rng(0)
    subnets = [menu.sample(config, rng) for _ in range(2)]
    nested_config = NestedConfig.of(config, menu, per_token=False)
    mlp, heads = (jnp.asarray([menu.indices(config, s)[n] for s in subnets]) for n in (0, 1))
    nested = {**nested_params(nested_config, params), WIDTH_INPUTS: {"mlp": mlp, "heads": heads}}
    tokens = random_tokens(config, 2, 9)
    found = NestedDecoder(nested_config).apply({"params": nested}, tokens).logits
    for row, subnet in enumerate(subnets):
        small, sliced = slice_params(config, params, subnet)
        expected = Decoder(small).apply({"params": sliced}, tokens[row : row + 1]).logits
        assert_close(found[row], expected[0])


def test_a_decoder_that_asks_routers_needs_their_width() -> None:
    with pytest.raises(ValueError, match=r"router_width=0: set the width .*, or per_token=False"):
        NestedConfig.of(make("llama")[0], Menu())


def by_token(tilt: float = 0.0) -> tuple[NestedConfig, Any]:
    """A model with random routers."""
    config, params = make("llama")
    menu = Menu((0.25, 0.5, 1.0), (0.5, 1.0))
    nested_config = NestedConfig.of(config, menu, router_width=8)
    key = jax.random.key(0)
    shapes = {"hidden": (3, 8, 2 + config.d_model), "heads": (3, 2, 8), "mlp": (3, 3, 8)}
    routers = {name: {"kernel": jax.random.normal(key, shape)} for name, shape in shapes.items()}
    costs = {
        "heads": jnp.tile(jnp.asarray([0.1, 0.2]), (3, 1)),
        "mlp": jnp.tile(jnp.asarray([0.1, 0.2, 0.4]), (3, 1)),
    }
    code = budget_code(jnp.asarray(0.7), (0.5, 1.0))
    return nested_config, {
        **nested_params(nested_config, params, routers, costs),
        WIDTH_INPUTS: {"code": code, "tilt": tilt},
    }


@pytest.mark.long
def test_tokens_choose_for_themselves() -> None:
    config, params = by_token()
    tokens = random_tokens(config, 3, 7)
    whole = NestedDecoder(config).apply({"params": params}, tokens).logits
    for row in range(3):
        alone = NestedDecoder(config).apply({"params": params}, tokens[row : row + 1, :5]).logits
        assert_close(whole[row, :5], alone[0])


@pytest.mark.long
def test_a_tilt_leads_to_the_smallest_or_the_whole_model() -> None:
    for tilt, subnet in ((1e6, Subnet.full), (-1e6, lambda c: Subnet.uniform(c, mlp=0.25, heads=0.5))):
        config, params = by_token(tilt)
        small, sliced = slice_params(*make("llama"), subnet(make("llama")[0]))
        tokens = random_tokens(config, 2, 7)
        found = NestedDecoder(config).apply({"params": params}, tokens).logits
        assert_close(found, Decoder(small).apply({"params": sliced}, tokens).logits)


@pytest.mark.nightly
@pytest.mark.long
def test_prompts_choose_whatever_stands_beside_and_behind_them() -> None:
    config, params = by_token()
    tokens, lengths = random_tokens(config, 3, 7), jnp.asarray([7, 3, 5])
    together = prompt_choices(config, params, tokens, lengths)
    assert len({tuple(row) for row in together["mlp"].tolist()}) > 1
    for row, length in enumerate(lengths.tolist()):
        alone = prompt_choices(config, params, tokens[row : row + 1, :length], lengths[row : row + 1])
        assert jax.tree.all(
            jax.tree.map(lambda a, b, row=row: jnp.array_equal(a[0], b[row]), alone, together)
        )

"""ALiBi: slopes, documents, and what of a model with slopes can be cut and sorted."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.models.decoder import Decoder
from elastic_lm.nn.attention import alibi_slopes
from elastic_lm.testing import all_logits, assert_causal, random_params, random_tokens, tiny_config
from elastic_lm.width.importance import Importance, permute
from elastic_lm.width.slicing import mask_params, slice_params

CONFIG = tiny_config(n_layers=2, position="alibi", elastic_groups=8, embed_norm=True)


def test_slopes_are_those_of_the_paper() -> None:
    """Press et al. 2022: for 8 heads 1/2, 1/4 ... 1/256."""
    eight = alibi_slopes(dataclasses.replace(CONFIG, n_heads=8, head_dim=4))
    np.testing.assert_array_equal(eight, 0.5 ** np.arange(1, 9))
    six = alibi_slopes(dataclasses.replace(CONFIG, n_heads=6, head_dim=4))
    np.testing.assert_allclose(six, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8], rtol=1e-6)
    scaled = alibi_slopes(dataclasses.replace(CONFIG, alibi_scale=0.25))
    np.testing.assert_allclose(scaled, 0.25 * alibi_slopes(CONFIG))


def test_nothing_depends_on_where_a_text_begins_or_on_what_follows() -> None:
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 1, 9)
    assert_causal(CONFIG, params)
    here = Decoder(CONFIG).apply({"params": params}, tokens).logits
    later = Decoder(CONFIG).apply({"params": params}, tokens, 40 + jnp.arange(9)[None]).logits
    np.testing.assert_allclose(here, later, atol=1e-4)
    other = dataclasses.replace(CONFIG, alibi_scale=3.0)
    assert np.abs(Decoder(other).apply({"params": params}, tokens).logits - here).max() > 0.01


def test_documents_of_a_packed_row_are_alone() -> None:
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 1, 9)
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    packed = Decoder(CONFIG).apply({"params": params}, tokens, positions, segments).logits
    alone = Decoder(CONFIG).apply({"params": params}, tokens[:, 4:]).logits
    np.testing.assert_allclose(packed[:, 4:], alone, atol=1e-4)


def test_heads_keep_their_slopes() -> None:
    message = "heads of a model with position='alibi' have slopes of their own and are not cut"
    with pytest.raises(ValueError, match=rf"menu\.heads=\(0\.5, 1\.0\): {message}"):
        Menu().sizes(CONFIG)
    with pytest.raises(ValueError, match=rf"menu\.groups=\(0\.5, 1\.0\): {message}"):
        Menu(heads=(1.0,), groups=(0.5, 1.0)).sizes(CONFIG)
    for cut, field in (({"heads": 0.5}, "heads"), ({"groups": 0.5}, "groups")):
        with pytest.raises(ValueError, match=rf"subnet\.{field}\[0\]=1: {message}"):
            slice_params(CONFIG, random_params(CONFIG), Subnet.uniform(CONFIG, **cut))


def test_all_else_is_cut_as_in_other_models() -> None:
    params = random_params(CONFIG)
    subnet = Subnet.uniform(CONFIG, mlp=0.5, d_model=0.5)
    tokens = random_tokens(CONFIG, 2, 9)
    small = all_logits(*slice_params(CONFIG, params, subnet), tokens)[2]
    large = all_logits(*mask_params(CONFIG, params, subnet), tokens)[2]
    np.testing.assert_allclose(small, large, rtol=1e-4, atol=1e-5)


def test_sorting_leaves_heads_where_they_are_and_the_logits_too() -> None:
    params, draw = random_params(CONFIG), np.random.default_rng(0).random
    owners = ("layers_0", "layers_1")
    scores = Importance(
        {owner: draw(64) for owner in owners}, {owner: draw((2, 2)) for owner in owners}, draw(32)
    )
    config, found = permute(CONFIG, params, scores, groups=8, channels=True)
    tokens = random_tokens(CONFIG, 2, 9)
    expected = all_logits(CONFIG, params, tokens)[2]
    np.testing.assert_allclose(all_logits(config, found, tokens)[2], expected, rtol=1e-4, atol=1e-5)
    gates = (tree["layers_0"]["mlp"]["down"]["kernel"] for tree in (params, found))
    assert not np.array_equal(*gates)


def test_settings_that_nothing_reads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alibi_scale=2\.0: is not read with position='rope'"):
        tiny_config(alibi_scale=2.0)
    with pytest.raises(ValueError, match=r"alibi_scale=0\.0: must be positive"):
        tiny_config(position="alibi", alibi_scale=0.0)
    with pytest.raises(ValueError, match=r"alibi_rounded=True: is not read with position='rope'"):
        tiny_config(alibi_rounded=True)
    with pytest.raises(ValueError, match=r"position_offset=2: is not read with position='alibi'"):
        tiny_config(position="alibi", position_offset=2)
    with pytest.raises(ValueError, match=r"layer_heads=\(4, 2, 4, 2\): layers .* have the same heads"):
        tiny_config(position="alibi", layer_heads=(4, 2, 4, 2), layer_kv_heads=(2, 1, 2, 1))
    with pytest.raises(ValueError, match=r"shared_norm=True: is of parallel branches"):
        tiny_config(shared_norm=True)
    with pytest.raises(ValueError, match=r"tied=True: a vocabulary head with a bias .* owns its kernel"):
        tiny_config(tied=True, head_bias=True)

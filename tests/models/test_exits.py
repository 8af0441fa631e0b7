"""Attaching exits: what they start from, and that the model itself does not notice."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig, ExitKind, ModelConfig
from elastic_lm.models.decoder import Decoder, Params, stack_layers
from elastic_lm.models.exits import attach_exits
from elastic_lm.models.registry import abstract_params
from elastic_lm.testing import all_logits, assert_same_tree, random_tokens, tiny_config

KEY = jax.random.key(0)
KINDS: tuple[ExitKind, ...] = ("embedding", "norm", "linear", "mlp", "block")


def drawn(config: ModelConfig) -> Params:
    """Parameters without special values: norms that are not the identity, biases that are not 0."""
    random = np.random.default_rng(0)
    shapes = nn.unbox(abstract_params(config))
    return jax.tree.map(lambda p: jnp.asarray(random.normal(0.0, 0.2, p.shape), p.dtype), shapes)


@pytest.mark.parametrize("model_tied", [False, True])
@pytest.mark.parametrize("exit_tied", [False, True])
def test_final_logits_are_bit_identical(model_tied: bool, exit_tied: bool) -> None:
    config = tiny_config(n_layers=len(KINDS), tied=model_tied)
    params = drawn(config)
    exits = [ExitConfig(i + 1, kind, exit_tied) for i, kind in enumerate(KINDS)]
    grown_config, grown = attach_exits(config, params, exits, KEY)
    tokens = random_tokens(config, 2, 9)
    before = all_logits(config, params, tokens)[config.n_layers]
    after = jax.jit(lambda p, t: Decoder(grown_config).bind({"params": p})(t))(grown, tokens)
    assert jnp.array_equal(before, after.logits)
    assert grown.keys() == abstract_params(grown_config).keys()
    for name, tree in params.items():
        same = jax.tree.map(lambda a, b: a is b, tree, grown[name])
        assert all(jax.tree.leaves(same)), f"{name} was copied"


@pytest.mark.parametrize("kind", ["norm", "mlp"])
@pytest.mark.parametrize("exit_tied", [False, True])
@pytest.mark.parametrize("model_tied", [False, True])
def test_copied_exit_after_the_last_layer_is_the_model(
    kind: ExitKind, exit_tied: bool, model_tied: bool
) -> None:
    config = tiny_config(tied=model_tied, final_softcap=5.0, sandwich_norm=True)
    params = drawn(config)
    grown_config, grown = attach_exits(config, params, [ExitConfig(4, kind, exit_tied)], KEY)
    tokens = random_tokens(config, 2, 9)
    output = jax.jit(lambda p, t: Decoder(grown_config).bind({"params": p})(t))(grown, tokens)
    assert jnp.array_equal(output.exit_logits[0], output.logits)


@pytest.mark.parametrize("stacked", [False, True])
def test_copied_modules(stacked: bool) -> None:
    config = tiny_config(mlp_bias=True)
    params = drawn(config)
    exits = [ExitConfig(1, "embedding"), ExitConfig(2, "mlp"), ExitConfig(3, "block", tied=True)]
    form = stack_layers(params) if stacked else params
    _, grown = attach_exits(config, form, exits, KEY)
    assert_same_tree(grown["exit_1"], {"head": params["head"]})
    expected = {"head": params["head"], "norm": params["final_norm"], "mlp": params["layers_1"]["mlp"]}
    assert_same_tree(grown["exit_2"], expected)
    assert_same_tree(grown["exit_3"], {"norm": params["final_norm"], "block": params["layers_3"]})
    # Copies, not aliases: the optimiser may donate an exit's buffers.
    assert grown["exit_1"]["head"]["kernel"] is not params["head"]["kernel"]


def test_random_modules() -> None:
    config = tiny_config(norm_offset=1.0, mlp_bias=True, vocab_size=512, d_mlp=256)
    params = drawn(config)
    exits = [ExitConfig(2, "mlp", init="random"), ExitConfig(3, "block", init="random")]
    grown_config, grown = attach_exits(config, params, exits, KEY)
    mlp, block = grown["exit_2"], grown["exit_3"]["block"]
    assert np.std(mlp["head"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(mlp["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(mlp["mlp"]["down"]["kernel"]) == pytest.approx(0.02 / 2, rel=0.05)
    assert np.std(block["attn"]["out"]["kernel"]) == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert not np.any(mlp["mlp"]["up"]["bias"])
    assert not np.any(mlp["norm"]["scale"])  # stored as scale - norm_offset: the identity
    _, again = attach_exits(config, params, exits[1:], KEY)
    assert_same_tree(again["exit_3"], grown["exit_3"])  # a draw depends on key and layer alone
    shapes = nn.unbox(abstract_params(grown_config))
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, shapes)


def test_exits_add_up_and_collide() -> None:
    config, params = tiny_config(), drawn(tiny_config())
    config, params = attach_exits(config, params, [ExitConfig(3, "norm")], KEY)
    config, params = attach_exits(config, params, [ExitConfig(1, "norm")], KEY)
    assert [e.layer for e in config.exits] == [1, 3]
    with pytest.raises(ValueError, match="distinct layers"):
        attach_exits(config, params, [ExitConfig(3, "mlp")], KEY)
    with pytest.raises(ValueError, match="only n_layers=4"):
        attach_exits(config, params, [ExitConfig(5, "mlp")], KEY)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_from_later_tokens(kind: ExitKind) -> None:
    config = tiny_config(windows=(0, 3, 0, 3))
    params = drawn(config)
    config, params = attach_exits(config, params, [ExitConfig(2, kind)], KEY)
    decoder = Decoder(config).bind({"params": params})
    tokens, positions = random_tokens(config, 1, 6), jnp.arange(6)[None]

    def logits(hidden: jax.Array) -> jax.Array:
        tap, _ = decoder.run_layers(hidden, positions, 0, 2)
        return jnp.sum(decoder.exit_logits(0, decoder.exit_features(0, tap))[0], axis=-1)

    jacobian = jax.jit(jax.jacrev(logits))(decoder.embed(tokens, positions))  # [T, 1, T, D]
    for at in range(6):
        reach = np.abs(jacobian[at, 0]).max(axis=-1)
        assert np.all(reach[at + 1 :] == 0)
        assert np.all(reach[: at + 1] > 0)

"""The public assertions hold on real models and fail on broken ones."""

import jax
import jax.numpy as jnp
import pytest

from elastic_lm import testing
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params

KEY = jax.random.key(0)


@pytest.mark.parametrize("overrides", [{"tied": True, "windows": (3, 0, 3)}, {"parallel_residual": True}])
def test_exits_are_causal_and_nested(overrides: dict) -> None:
    config = testing.tiny_config(exits=(1, 2), n_layers=3, **overrides)
    params = init_params(config, KEY)
    testing.assert_causal(config, params, length=5)
    testing.assert_exits_nested(config, params)


def test_assert_causal_sees_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    config = testing.tiny_config(n_layers=2)
    params = init_params(config, KEY)
    forward = Decoder.final_features

    def peek(self: Decoder, hidden: jax.Array) -> jax.Array:
        return forward(self, jnp.roll(hidden, -1, axis=1))

    monkeypatch.setattr(Decoder, "final_features", peek)
    with pytest.raises(AssertionError, match="depth 2: a position before"):
        testing.assert_causal(config, params, length=4)
    testing.all_logits.clear_cache()


def test_assert_same_tree_names_the_tensor() -> None:
    params = init_params(testing.tiny_config(n_layers=1), KEY)
    changed = {**params, "final_norm": {"scale": params["final_norm"]["scale"] + 1}}
    testing.assert_same_tree(params, params)
    with pytest.raises(AssertionError, match="final_norm"):
        testing.assert_same_tree(params, changed)

"""How long a row a decoder takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.model import ModelConfig, RopeConfig
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import abstract_params
from elastic_lm.nn.block import scaled
from elastic_lm.testing import tiny_config


def shape_of_logits(config: ModelConfig, length: int) -> tuple[int, ...]:
    """Traced only; nothing is compiled."""
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.eval_shape(Decoder(config).apply, {"params": abstract_params(config)}, tokens).logits.shape


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"rope": RopeConfig(scaling="dynamic", factor=4.0)}, "dynamic"),
        ({"position": "learned"}, "learned"),
    ],
)
def test_positions_that_end_are_not_made_up(changes: dict, kind: str) -> None:
    config = tiny_config(n_layers=1, max_len=16, **changes)
    assert shape_of_logits(config, 16) == (1, 16, 64)
    with pytest.raises(ValueError, match=rf"length of a row=17: is more than max_len=16, .*{kind}"):
        shape_of_logits(config, 17)


def test_rotary_positions_go_on_beyond_the_context() -> None:
    for rope in (RopeConfig(), RopeConfig(scaling="linear", factor=2.0)):
        assert shape_of_logits(tiny_config(n_layers=1, max_len=16, rope=rope), 17) == (1, 17, 64)


def test_dynamic_rope_is_not_computed_beyond_the_pretrained_context() -> None:
    rope = RopeConfig(scaling="dynamic", factor=4.0, original_max_len=64)
    assert tiny_config(max_len=64, rope=rope).max_len == 64
    with pytest.raises(ValueError, match=r"max_len=128: must be at most rope\.original_max_len=64"):
        tiny_config(max_len=128, rope=rope)


def test_what_is_added_to_the_stream_is_rounded_once() -> None:
    """0.22 (Granite) is no bfloat16 number; torch multiplies by the float32 number, too."""
    x = jax.random.normal(jax.random.key(0), (1000,), jnp.bfloat16)
    product = np.asarray(x, np.float32) * np.float32(0.22)
    np.testing.assert_array_equal(scaled(x, 0.22), jnp.asarray(product, jnp.bfloat16))
    assert scaled(x, 0.22).dtype == jnp.bfloat16

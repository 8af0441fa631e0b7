"""Parameters laid out for decoding: the same numbers, in the layout and dtype that programs read."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from elastic_lm.models.placement import described_for_decoding, in_row_order, placed_for_decoding, row_order
from elastic_lm.models.registry import abstract_params
from elastic_lm.testing import all_logits, assert_same_tree, random_params, tiny_config

HERE = SingleDeviceSharding(jax.devices()[0])


def layouts(params):
    """{path: layout}; None = the device's own."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf.format.layout for path, leaf in leaves}


def test_row_order_keeps_the_numbers() -> None:
    x = jnp.arange(12.0).reshape(3, 4)
    turned = jax.device_put(x, Format(Layout((1, 0)), x.sharding))
    assert turned.format.layout.major_to_minor == (1, 0)
    back = in_row_order(turned)
    assert back.format.layout.major_to_minor == (0, 1)
    np.testing.assert_array_equal(back, x)
    assert in_row_order(back) is back


def test_nothing_moves_where_there_is_no_tpu() -> None:
    params = random_params(tiny_config())
    assert placed_for_decoding(params, "bfloat16") is params


def test_tables_and_float32_kernels_lie_in_row_order() -> None:
    config = tiny_config(dtype="bfloat16", param_dtype="bfloat16", tied=False)
    shapes = nn.unbox(abstract_params(config))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=HERE), shapes)
    found = layouts(described_for_decoding(shapes, "bfloat16"))
    assert found["['embed']['table']"] == found["['head']['kernel']"] == Layout((0, 1))
    assert found["['layers_0']['mlp']['up']['kernel']"] is None

    exact = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=HERE), shapes)
    assert set(layouts(described_for_decoding(exact, "float32")).values()) == {
        Layout((0,)),
        *map(Layout, ORDERS),
    }
    assert row_order(exact["layers_0"]["mlp"]["up"]["kernel"]).layout == Layout((0, 1, 2))


ORDERS = ((0, 1), (0, 1, 2), (0, 1, 2, 3))


def test_kernels_that_are_rounded_beforehand_give_the_same_logits() -> None:
    config = tiny_config(exits=(2,), dtype="bfloat16")  # parameters in float32, as trained exits are
    params = random_params(config)
    at = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=HERE), params)
    wanted = jax.tree.map(lambda x: x.dtype, described_for_decoding(at, config.dtype))
    rounded = jax.tree.map(lambda x, dtype: x.astype(dtype), params, wanted)
    assert rounded["layers_0"]["attn"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert rounded["final_norm"]["scale"].dtype == jnp.float32

    tokens = jnp.arange(10)[None] % config.vocab_size
    assert_same_tree(all_logits(config, params, tokens), all_logits(config, rounded, tokens))

"""Splash attention and kernels in 8 bits, compiled for TPUs on a machine that has none."""

import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from elastic_lm.models.sharding import make_mesh
from elastic_lm.nn.int8 import Int8Kernel
from elastic_lm.nn.kernels import choose, splash, unserved
from elastic_lm.nn.linear import linear

pytest.importorskip("libtpu", reason='compiles for TPUs: pip install "elastic-lm[tpu-aot]"')
pytestmark = pytest.mark.long

ROWS = ("data", "fsdp")
NAMES = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
COLLECTIVES = re.compile(rf" (?:{NAMES})(?:-start)?\(")


@pytest.fixture(scope="module")
def devices() -> Any:
    """Eight chips of a TPU v5e."""
    from jax.experimental import topologies

    # There is no machine to ask, and other tests may compile for TPUs meanwhile.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


@pytest.mark.parametrize(
    ("head_dim", "windows", "sizes"), [(64, (), (2, 2, 2)), (128, (512, 0), (1, 1, 1)), (128, (), (2, 1, 4))]
)
def test_splash_with_its_gradient_needs_no_temporaries_and_no_collectives(
    devices: Any, head_dim: int, windows: tuple[int, ...], sizes: tuple[int, int, int]
) -> None:
    count = sizes[0] * sizes[1] * sizes[2]
    mesh = make_mesh(*sizes, devices=devices[:count])
    kernel = choose("auto", mesh)
    assert kernel is not None

    def shape(*size: int, spec: Any, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    heads, kv_heads, t = 8, 4, 2048
    q = shape(4, t, heads, head_dim, spec=(ROWS, None, "tensor"))
    kv = shape(4, kv_heads, t, head_dim, spec=(ROWS, "tensor"))
    segments = shape(4, t, spec=(ROWS,), dtype=jnp.int32)
    window = shape(spec=(), dtype=jnp.int32)
    assert not unserved(kernel, q, kv_heads, softcap=0.0)

    def loss(q: Any, k: Any, v: Any, segments: Any, window: Any) -> jax.Array:
        size = window if windows else 0
        out = splash(kernel, q, k, v, segments, size, windows, scale=0.1, softcap=0.0)
        return jnp.sum(out.astype(jnp.float32))

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, segments, window).compile()
    text = program.as_text()
    assert text is not None
    assert text.count('custom_call_target="tpu_custom_call"') >= 3  # forward, keys and values, queries
    assert not COLLECTIVES.search(text)
    logits = 4 * heads * t * t * 4 / count
    assert program.memory_analysis().temp_size_in_bytes < logits / 8


@pytest.mark.parametrize("rows", [1, 8])
def test_a_loop_reads_8_bits_and_widens_nothing_in_memory(devices: Any, rows: int) -> None:
    sharding = jax.sharding.SingleDeviceSharding(devices[0])

    def shape(*size: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    def loop(x: jax.Array, kernels: list[Any], n: jax.Array) -> jax.Array:
        def body(_: Any, x: jax.Array) -> jax.Array:
            for kernel in kernels:
                x = jnp.tanh(linear(x, kernel))
            return x

        return jax.lax.fori_loop(0, n, body, x)

    d, count = 2048, 4
    kernel = Int8Kernel(shape(d, d, dtype=jnp.int8), shape(d, dtype=jnp.float32))
    given = shape(rows, 1, d, dtype=jnp.bfloat16), [kernel] * count, shape(dtype=jnp.int32)
    memory = jax.jit(loop).lower(*given).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 1.1 * count * d * d
    assert memory.temp_size_in_bytes < d * d / 4

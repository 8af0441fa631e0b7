"""What is read from compiled programs: FLOPs, traffic, collectives, and by how much one is too large."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from elastic_lm.cost.compiled import DoesNotFit, compile_program, read_text, too_large
from elastic_lm.cost.topologies import described_mesh, parse_topology, placed
from elastic_lm.cost.traced import traced_flops
from elastic_lm.cost.traffic import memory_traffic

# As the TPU compiler writes them, shortened: an all-gather that runs beside a product stands in three
# computations under one channel, a reduce-scatter is a computation, and loops have no known trip count.
TPU_TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%start (p: bf16[256,64]) -> bf16[1024,64] {
  %p = bf16[256,64]{1,0} parameter(0)
  ROOT %ag = bf16[1024,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0)
}

%done (p.1: bf16[256,64]) -> bf16[1024,64] {
  %p.1 = bf16[256,64]{1,0} parameter(0)
  ROOT %ag.1 = bf16[1024,64]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0)
}

%all-reduce-scatter.1 (p.2: f32[1024,64]) -> f32[256,64] {
  %p.2 = f32[1024,64]{1,0} parameter(0)
  %ar = f32[1024,64]{1,0} all-reduce(%p.2), channel_id=9, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %ds = f32[256,64]{1,0} dynamic-slice(%ar), dynamic_slice_sizes={256,64}
}

%body (c: (s32[], bf16[256,64])) -> (s32[], bf16[256,64]) {
  %c = (s32[], bf16[256,64]) parameter(0)
  %w = bf16[256,64]{1,0} get-tuple-element(%c), index=1
  %f = bf16[1024,64]{1,0} fusion(%w), kind=kCustom, calls=%start
  %g = bf16[1024,64]{1,0} fusion(%w), kind=kCustom, calls=%done
  %conv = bf16[8,1024]{1,0} convolution(%x, %g), dim_labels=bf_oi->bf
  %x = bf16[8,64]{1,0} constant({...})
  %sum = bf16[8,1024]{1,0} all-reduce(%conv), channel_id=8, replica_groups=mesh['a'=4,'b'=2] {'b'}
  ROOT %t = (s32[], bf16[256,64]) tuple(%i, %w)
}

%condition (c.1: (s32[], bf16[256,64])) -> pred[] {
  %limit = s32[] constant(12)
  %c.1 = (s32[], bf16[256,64]) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: bf16[256,64], b: f32[1024,64]) -> f32[256,64] {
  %a = bf16[256,64]{1,0} parameter(0)
  %b = f32[1024,64]{1,0} parameter(1)
  %loop = (s32[], bf16[256,64]) while(%t.1), condition=%condition, body=%body
  %alone = f32[1024,64]{1,0} all-reduce(%b), channel_id=3, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
  ROOT %rs = f32[256,64]{1,0} fusion(%alone), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_and_flops_of_a_tpu_program() -> None:
    flops, found, transfers = read_text(TPU_TEXT)
    assert flops == 12 * 2 * 8 * 1024 * 64
    assert transfers == 0
    assert [(each.kind, each.group, each.count, each.sites, each.bytes) for each in found] == [
        ("all-gather", 4, 12, 1, 12 * 1024 * 64 * 2),
        ("all-reduce", 2, 12, 1, 12 * 8 * 1024 * 2),
        ("reduce-scatter", 4, 1, 1, 1024 * 64 * 4),
    ]
    gathered, reduced, scattered = found
    assert gathered.moved == gathered.bytes * 3 / 4
    assert reduced.moved == reduced.bytes
    assert scattered.moved == scattered.bytes * 3 / 4


def scanned(x: jax.Array, weights: jax.Array) -> jax.Array:
    def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ weight), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0])


def batched(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(jnp.einsum("bd,lde->lbe", x, weights) ** 2)


@pytest.mark.parametrize("function", [scanned, jax.grad(scanned, argnums=(0, 1)), jax.grad(batched)])
def test_flops_are_those_of_the_function_as_written(function: Callable[..., jax.Array]) -> None:
    """Two countings without a line in common: of the jaxpr, and of the optimised program."""
    shapes = placed((jnp.zeros((8, 32)), jnp.zeros((5, 32, 32))), described_mesh(parse_topology("cpu:1")))
    program = compile_program(jax.jit(function), *shapes)
    assert program.flops == traced_flops(jax.make_jaxpr(function)(*shapes), at_most=True) > 0
    assert program.collectives == ()
    assert program.host_transfers == 0
    assert program.arguments == 4 * (8 * 32 + 5 * 32 * 32)


def test_a_conditional_counts_its_most_expensive_branch_as_written() -> None:
    def either(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    traced = jax.make_jaxpr(either)(jnp.zeros((4, 4)))
    assert traced_flops(traced, at_most=True) == 2 * 2 * 4**3
    assert traced_flops(traced) is None


def test_traffic_counts_slices_of_stacked_weights() -> None:
    """A loop over stacked weights reads each of them once, not all of them in every turn."""
    shapes = placed((jnp.zeros((8, 256)), jnp.zeros((16, 256, 256))), described_mesh(parse_topology("cpu:1")))
    program = compile_program(jax.jit(scanned), *shapes)
    weights = 4 * 16 * 256 * 256
    assert weights <= memory_traffic(program.text) <= 4 * weights


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.50G of 15.75G hbm. Exceeded hbm "
        "capacity by 6.75G.\n\nTotal hbm usage >= 23.00G:\n",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(22.50G) exceeds available HBM (15.75G).",
    ],
)
def test_what_does_not_fit_says_by_how_much(message: str) -> None:
    error = too_large(message)
    assert isinstance(error, DoesNotFit)
    assert (error.needed, error.available) == (22.5 * 2**30, 15.75 * 2**30)
    assert "\n" not in str(error)

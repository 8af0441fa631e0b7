"""Prefill and the decode loop compiled for TPUs, which need not be there, and what is read from the programs.

    temporaries   bytes beside the arguments; a copy of a weight would be among them
    copies        steps that write as many numbers as a kernel has to the device's main memory
    a layer       its kernels, and cycles by the compiler's own estimate

A step is what the device starts by itself: a fusion, a product, a copy. A fusion takes 1,800 cycles at least
by that estimate, however little it does.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastic_lm.config.model import ModelConfig
from elastic_lm.cost.compiled import Instruction, Program, compile_program, parse
from elastic_lm.cost.topologies import described_mesh, parse_topology
from elastic_lm.decode.prefill import prefill
from elastic_lm.decode.served import jit_prefill, jit_run
from elastic_lm.decode.settings import Settings, make_controls
from elastic_lm.decode.sharded import state_shardings
from elastic_lm.decode.state import Mode
from elastic_lm.models.placement import described_for_decoding
from elastic_lm.models.registry import abstract_params
from elastic_lm.models.sharding import fitting_shardings

# Opcodes that start nothing on the device, or end what another one has started.
NOTHING_NEW = {
    "parameter",
    "get-tuple-element",
    "bitcast",
    "tuple",
    "while",
    "conditional",
    "constant",
    "call",
}
NOTHING_NEW |= {"copy-done", "slice-done", "opt-barrier", "after-all", "add-dependency"}
LEAST = 2**15  # elements of a kernel; biases and norms are smaller


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeProgram:
    """What is decoded, and where.

    Attributes:
      config: of the model.
      rows: of the batch.
      prompt: positions of the padded prompts.
      capacity: positions per cache.
      window: tokens that may be pending.
      mode: of the loop.
      lookup: rows draft from their own text.
      topology: of the TPUs.
      tensor: devices that share each layer, all of the topology's.
      placed: parameters lie as a sampler places them; otherwise as a device keeps them by default.
    """

    config: ModelConfig
    rows: int = 1
    prompt: int = 64
    capacity: int = 256
    window: int = 2
    mode: Mode = "exact"
    lookup: bool = False
    topology: str = "v5e:1x1"
    tensor: int = 1
    placed: bool = True

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Of the devices."""
        return described_mesh(parse_topology(self.topology), (1, 1, self.tensor))

    @functools.cached_property
    def params(self) -> Any:
        """Descriptions of the parameters."""
        shapes = nn.unbox(abstract_params(self.config))
        params = _described(shapes, fitting_shardings(self.config, self.mesh))
        return described_for_decoding(params, self.config.dtype) if self.placed else params

    def prefill(self) -> Program:
        """The program that reads the prompts."""
        return compile_program(jit_prefill, self.config, self.params, *self._prompts(), **self._shapes())

    def loop(self) -> Program:
        """The decode loop, from the state that prefill leaves."""
        begun = functools.partial(prefill, self.config, **self._shapes())
        state = jax.eval_shape(begun, self.params, *self._prompts())
        state = _described(state, state_shardings(self.mesh, state))
        count = jax.ShapeDtypeStruct((), jnp.int32)
        controls, count = self._whole((jax.eval_shape(self._controls), count))
        on = self._on_mesh()
        return compile_program(jit_run, self.config, self.params, state, controls, count, self.mode, **on)

    def _on_mesh(self) -> dict[str, Any]:
        return {"mesh": self.mesh} if self.tensor > 1 else {}

    def _whole(self, tree: Any) -> Any:
        return _described(tree, jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), tree))

    def _prompts(self) -> tuple[Any, ...]:
        shapes = ((self.rows, self.prompt), (self.rows,), (self.rows,), ())
        return self._whole(tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))

    def _shapes(self) -> dict[str, Any]:
        shapes = {"capacity": self.capacity, "window": self.window, "lookup": self.lookup}
        return {**shapes, **self._on_mesh()}

    def _controls(self) -> Any:
        lossless = np.full(self.rows, self.mode == "verify")
        return make_controls(
            self.config, [[1]] * self.rows, 4, self.capacity, Settings(), [None] * self.rows,
            lossless=lossless, adapt=True, fire_share=0.0, together=False, tick_costs=(1.0,) * self.window,
        )  # fmt: skip


def _described(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree, with these shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def steps(program: Program) -> Iterator[tuple[str, Instruction]]:
    """(computation, instruction) of everything that the device starts."""
    computations, _ = parse(program.text)
    inside = set()  # computations of fusions and reductions
    for each in (each for instructions in computations.values() for each in instructions):
        if each.opcode not in ("while", "conditional", "call"):
            inside |= set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", each.attributes))
    for name, instructions in computations.items():
        if name not in inside:
            yield from ((name, each) for each in instructions if each.opcode not in NOTHING_NEW)


def copied_weights(program: Program, params: Any) -> list[str]:
    """Steps that write as many numbers as a kernel has to the device's main memory.

    Args:
      program: that was compiled.
      params: descriptions of its parameters.
    """
    leaves = jax.tree.leaves(params)
    shards = (math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    sizes = {size for size in shards if size >= LEAST}
    found = []
    for name, each in steps(program):
        # Of a copy that runs beside others, the first of a tuple is what is written. S(1) is the memory on
        # the chip, into which weights are fetched ahead of their use, in slices or whole.
        first = re.match(r"\(*(\w+)\[([\d,]*)\](\{[^}]*\})?", each.type)
        if first is None or "S(1)" in (first[3] or "") or each.opcode == "slice-start":
            continue
        if math.prod(int(n) for n in first[2].split(",") if n) in sizes:
            found.append(f"{name}: {each.opcode} {each.type[:80]}")
    return found


def by_layer(program: Program) -> dict[str, tuple[int, int]]:
    """Steps of every part of the model that the program names, and their cycles by the compiler's estimate.

    Returns:
      {"layers_0": (steps, cycles), ...}; "" is what belongs to no layer, such as sampling.
    """
    found = collections.Counter[str]()
    cycles = collections.Counter[str]()
    for _, each in steps(program):
        name = re.search(r'op_name="[^"]*?(layers_\d+|final_logits|exit_logits)', each.attributes)
        part = name[1] if name else ""
        estimate = re.search(r'estimated_cycles":"(\d+)"', each.attributes)
        if not each.opcode.endswith("-start"):
            found[part] += 1
            cycles[part] += int(estimate[1]) if estimate else 0
    return {part: (found[part], cycles[part]) for part in found}

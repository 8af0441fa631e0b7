"""Programs of decoding, compiled for TPUs that are not there, and what is read from their text."""

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

import elastic_lm as el
from elastic_lm.cost.compiled import Instruction, Program, compile_program, parse
from elastic_lm.cost.topologies import described_mesh, parse_topology
from elastic_lm.decode.prefill import prefill
from elastic_lm.decode.served import jit_prefill, jit_run
from elastic_lm.decode.settings import Settings, make_controls
from elastic_lm.decode.sharded import state_shardings
from elastic_lm.decode.state import Mode
from elastic_lm.models.placement import row_order
from elastic_lm.models.registry import abstract_params
from elastic_lm.models.sharding import param_shardings

# Sizes of Llamas; a few of their layers stand for all of them, which are alike.
SMOL_135M = {"vocab_size": 49152, "d_model": 576, "n_heads": 9, "n_kv_heads": 3, "d_mlp": 1536, "tied": True}
LLAMA_1B = {
    **{"vocab_size": 128256, "d_model": 2048, "n_heads": 32, "n_kv_heads": 8, "d_mlp": 8192},
    "tied": True,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 8,
    "d_mlp": 14336,
    "tied": False,
}
LLAMA_70B = {
    "vocab_size": 128256,
    "d_model": 8192,
    "n_heads": 64,
    "n_kv_heads": 8,
    "d_mlp": 28672,
    "tied": False,
}
PROMPT, CAPACITY = 64, 256
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
NOTHING_NEW |= {
    "copy-done",
    "slice-done",
    "opt-barrier",
    "after-all",
    "add-dependency",
}  # of the "-start" before
LEAST = 2**15  # elements of a kernel; biases and norms are smaller


def config_of(sizes: dict[str, Any], n_layers: int = 2, **fields: Any) -> el.ModelConfig:
    """A Llama of some layers, in bfloat16 unless said otherwise."""
    dtypes = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    return el.ModelConfig(**{"max_len": 4096, "n_layers": n_layers, **dtypes, **sizes, **fields})


def described(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is decoded, and where.

    Attributes:
      config: of the model.
      rows: of the batch.
      window: tokens that may be pending.
      mode: of the loop.
      lookup: rows draft from their own text.
      topology: of the TPUs.
      tensor: devices of the topology that share each layer; all of them.
      in_row_order: parameters lie as a sampler places them.
    """

    config: el.ModelConfig
    rows: int = 1
    window: int = 2
    mode: Mode = "exact"
    lookup: bool = False
    topology: str = "v5e:1x1"
    tensor: int = 1
    in_row_order: bool = True

    @functools.cached_property
    def mesh(self) -> Mesh:
        return described_mesh(parse_topology(self.topology), (1, 1, self.tensor))

    @property
    def on(self) -> dict[str, Any]:
        """The static argument of a mesh of several devices."""
        return {"mesh": self.mesh} if self.tensor > 1 else {}

    def whole(self, tree: Any) -> Any:
        return described(tree, jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), tree))

    def params(self) -> Any:
        shapes = nn.unbox(abstract_params(self.config))
        placed = described(shapes, param_shardings(self.config, self.mesh))
        return described(shapes, jax.tree.map(row_order, placed)) if self.in_row_order else placed

    def prompts(self) -> tuple[Any, ...]:
        shapes = ((self.rows, PROMPT), (self.rows,), (self.rows,), ())
        return self.whole(tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))

    def shapes(self) -> dict[str, Any]:
        return {"capacity": CAPACITY, "window": self.window, "lookup": self.lookup}

    def prefill_program(self) -> Program:
        args = self.config, self.params(), *self.prompts()
        return compile_program(jit_prefill, *args, **self.shapes(), **self.on)

    def loop_program(self) -> Program:
        """The loop at the state that prefill leaves."""
        begun = functools.partial(prefill, self.config, **self.shapes())
        state = jax.eval_shape(begun, self.params(), *self.prompts())
        state = described(state, state_shardings(self.mesh, state))
        controls = jax.eval_shape(self.controls)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        args = self.params(), state, *self.whole((controls, count))
        return compile_program(jit_run, self.config, *args, self.mode, **self.on)

    def controls(self) -> Any:
        lossless = np.full(self.rows, self.mode == "verify")
        return make_controls(
            self.config, [[1]] * self.rows, 4, CAPACITY, Settings(), [None] * self.rows, lossless=lossless,
            adapt=True, fire_share=0.0, together=False, tick_costs=(1.0,) * self.window,
        )  # fmt: skip


def steps(program: Program) -> Iterator[tuple[str, Instruction]]:
    """(computation, instruction) of what runs as a kernel of its own or moves data."""
    computations, _ = parse(program.text)
    inside = set()
    for instructions in computations.values():
        for each in instructions:
            if each.opcode not in ("while", "conditional", "call"):
                inside |= set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", each.attributes))
    for name, instructions in computations.items():
        if name not in inside:
            yield from ((name, each) for each in instructions if each.opcode not in NOTHING_NEW)


def copied_weights(program: Program, sizes: set[int]) -> list[str]:
    """Steps that write as many numbers as a kernel has to the device's main memory.

    Args:
      program: that was compiled.
      sizes: numbers of elements of the kernels, as one device holds them.
    """
    found = []
    for name, each in steps(program):
        # Of a copy that runs beside others, the first of a tuple is what is written. S(1) is the memory on
        # the chip, into which weights are fetched ahead of their use.
        first = re.match(r"\(*(\w+)\[([\d,]*)\](\{[^}]*\})?", each.type)
        if first is None or "S(1)" in (first[3] or "") or each.opcode == "slice-start":
            continue
        if math.prod(int(n) for n in first[2].split(",") if n) in sizes:
            found.append(f"{name}: {each.opcode} {each.type[:80]}")
    return found


def kernel_sizes(decoding: Decoding) -> set[int]:
    """Numbers of elements of the kernels and tables, as one device holds them."""
    leaves = jax.tree.leaves(decoding.params())
    shards = (leaf.sharding.shard_shape(leaf.shape) for leaf in leaves)
    return {size for size in map(math.prod, shards) if size >= LEAST}

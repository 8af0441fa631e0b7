"""What a compiled program takes, without running it: bytes per device, FLOPs, collectives, host transfers.

Bytes are the compiler's own (`memory_analysis`). The rest is read from the optimised program, because the
compiler's cost analysis counts the body of a loop once. A loop counts as often as it runs where that is a
constant of the program, as in `lax.scan`, and once otherwise, as in a loop until every row has ended.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
HOST = ("infeed", "outfeed", "send", "recv")
CONTROL = ("while", "conditional")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFit(ValueError):
    """The compiler refuses a program that needs more memory than the device has.

    Attributes:
      needed: bytes of one device, as far as the compiler says.
      available: bytes of one device that programs may use.
    """

    def __init__(self, message: str, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective over groups of one size.

    Attributes:
      kind: one of `COLLECTIVES`.
      group: devices that take part together.
      count: runs of it per call of the program.
      sites: places of it in the program; a loop has it in one place and runs it often.
      bytes: whole arrays that are gathered, reduced or sent, on one device, over all runs.
      names: what of the source they come from, by the program's metadata.
    """

    kind: str
    group: int
    count: int
    sites: int
    bytes: int
    names: tuple[str, ...] = ()

    @property
    def moved(self) -> float:
        """Bytes that one device receives, by the ring algorithms."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program; bytes, FLOPs and collectives are those of one device and one call.

    Attributes:
      arguments: bytes of the arguments.
      outputs: bytes of the results.
      aliased: bytes of results that lie where donated arguments were.
      temporaries: most bytes that are alive beside them at any time.
      code: bytes of the program itself.
      flops: of products of matrices, a multiplication and an addition counted as two.
      collectives: by kind and size of their groups.
      host_transfers: places where it talks to the host.
      text: the optimised program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: float
    collectives: tuple[Collective, ...]
    host_transfers: int
    text: str = dataclasses.field(repr=False)

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def counts(self) -> dict[str, int]:
        """Places of every kind of collective in the program, over groups of more than one device."""
        found: collections.Counter[str] = collections.Counter()
        for each in self.collectives:
            found[each.kind] += each.sites
        return dict(found)


def compile_program(function: Any, *args: Any, **kwargs: Any) -> Program:
    """Compiles a function for the devices of its abstract arguments, and reads what it takes.

    Nothing is allocated and nothing runs. For TPUs that are not there, the shardings are those of a mesh from
    `cost.topologies.described_mesh`.

    Args:
      function: from `jax.jit`, with its static and donated arguments.
      *args: trees of `jax.ShapeDtypeStruct` with shardings; static arguments as they are.
      **kwargs: likewise.

    Raises:
      DoesNotFit: the compiler knows the device's memory, and the program needs more.

    Example:
      ```python
      import jax
      import jax.numpy as jnp

      from elastic_lm.cost.compiled import compile_program
      from elastic_lm.cost.topologies import described_mesh, parse_topology, placed

      x = placed(jnp.zeros((8, 16)), described_mesh(parse_topology("cpu:1")))
      program = compile_program(jax.jit(lambda x: x @ x.T), x)
      assert program.arguments == 4 * 8 * 16 and program.flops == 2 * 8 * 8 * 16
      ```
    """
    import jax

    lowered = function.lower(*args, **kwargs)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _too_large(str(error)) from None
    return read_program(compiled)


def read_program(compiled: Any) -> Program:
    """What a compiled program takes.

    Args:
      compiled: from `jax.jit(...).lower(...).compile()`.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    flops, found, transfers = read_text(text)
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=flops,
        collectives=found,
        host_transfers=transfers,
        text=text,
    )


def _too_large(message: str) -> DoesNotFit:
    """From the compiler's message, whose numbers have units."""
    sizes = [float(n) * UNITS[unit] for n, unit in re.findall(r"\b(\d+\.\d+)([KMGT]?)\b", message)]
    needed, available = (int(max(sizes[:2])), int(min(sizes[:2]))) if len(sizes) > 1 else (0, 0)
    first = message.partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
    return DoesNotFit(first, needed, available)


# What follows reads the text of an optimised HLO module:
#   %name (parameters) -> type {                                   a computation
#     %name = type opcode(%operands), attribute=..., ...           an instruction


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


Computations = Mapping[str, list[Instruction]]


def read_text(text: str) -> tuple[float, tuple[Collective, ...], int]:
    """(FLOPs, collectives, transfers to the host) of an optimised HLO module."""
    computations, entry = parse(text)
    devices = int(_found(r"num_partitions=(\d+)", text) or 1) * int(_found(r"replica_count=(\d+)", text) or 1)
    flops, transfers = 0.0, 0
    runs: dict[tuple[str, int], list[Any]] = {}
    for times, scope, inside, instruction in _executed(computations, entry):
        opcode = instruction.opcode
        if opcode in ("dot", "convolution"):
            shapes = {each.name: each.type for each in computations[inside]}
            flops += times * _product_flops(instruction, shapes)
        elif opcode.removesuffix("-start") in HOST or "host" in _target(instruction):
            transfers += 1
        elif (kind := _collective_kind(instruction, inside)) and (
            group := _group_size(instruction.attributes, devices)
        ) > 1:
            size = _payload(kind, instruction, computations[inside])
            # One that runs beside a product is written into several computations, under one channel.
            channel = _found(r"channel_id=(\d+)", instruction.attributes) or instruction.name
            runs.setdefault((kind, group), []).append((scope, channel, times, size, _source(instruction)))
    return flops, tuple(_summed(key, found) for key, found in sorted(runs.items())), transfers


def _summed(key: tuple[str, int], runs: list[Any]) -> Collective:
    distinct = {(scope, channel): (times, size) for scope, channel, times, size, _ in runs}
    names = tuple(sorted({name for *_, name in runs if name}))
    count, bytes_ = (
        sum(times for times, _ in distinct.values()),
        sum(times * size for times, size in distinct.values()),
    )
    return Collective(key[0], key[1], count, len(distinct), bytes_, names)


def _executed(
    computations: Computations, name: str, times: int = 1, scope: str = ""
) -> Iterator[tuple[int, str, str, Instruction]]:
    """(runs, loop or branch around it, computation, instruction) of everything that runs."""
    for instruction in computations.get(name, ()):
        yield times, scope or name, name, instruction
        if instruction.opcode == "while":
            body = _found(r"body=%?([\w.\-]+)", instruction.attributes)
            often = times * trip_count(computations, instruction)
            yield from _executed(computations, body, often, f"{scope}/{instruction.name}")
        else:
            inner = f"{scope}/{instruction.name}" if instruction.opcode == "conditional" else scope or name
            for callee in _callees(instruction):
                branch = f"{inner}/{callee}" if instruction.opcode == "conditional" else inner
                yield from _executed(computations, callee, times, branch)


def _callees(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs; not the scalar functions of reductions."""
    text = instruction.attributes
    found = re.findall(r"(?:calls|true_computation|false_computation)=%?([\w.\-]+)", text)
    if instruction.opcode == "call":
        found += re.findall(r"to_apply=%?([\w.\-]+)", text)
    for several in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", text):
        found += re.findall(r"%?([\w.\-]+)", several)
    return found


def trip_count(computations: Computations, loop: Instruction) -> int:
    """How often a loop runs; 1 where that is no constant of the program."""
    if known := _found(r'known_trip_count[^}]*"n":\s*"?(\d+)', loop.attributes):
        return int(known)

    # A scan's condition is `i < length`, with i from 0.
    condition = computations.get(_found(r"condition=%?([\w.\-]+)", loop.attributes), [])
    constants = {each.name: each for each in condition if each.opcode == "constant"}
    for each in condition:
        if each.root and each.opcode == "compare" and "direction=LT" in each.attributes:
            limits = [constants[name].operands for name in each.operands if name in constants]
            return int(limits[0][0]) if limits else 1
    return 1


def _collective_kind(instruction: Instruction, computation: str) -> str:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in COLLECTIVES:
        return ""
    # The TPU's reduce-scatter is a computation of this name, of an all-reduce and a slice.
    if opcode == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return opcode


def _payload(kind: str, instruction: Instruction, computation: list[Instruction]) -> int:
    """Bytes of the whole array on one device: the gathered result, or what is reduced or sent."""
    types = {each.name: each.type for each in computation}
    read = sum(size_of(types.get(name, "")) for name in instruction.operands)
    if kind != "all-gather":
        return read
    written = size_of(instruction.type)
    return written - read if instruction.opcode.endswith("-start") else written


def _group_size(attributes: str, devices: int) -> int:
    """Devices that take part in a collective together."""
    if "source_target_pairs" in attributes:
        return devices
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    groups = _found(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(groups.split(",")) if groups else devices


def _product_flops(instruction: Instruction, types: Mapping[str, str]) -> float:
    """FLOPs of a dot or a convolution, by the shapes of its result and its operands."""
    left, right = (_dims(types.get(name, "")) for name in instruction.operands[:2])
    out, text = _dims(instruction.type), instruction.attributes
    if instruction.opcode == "dot":
        contracted = _found(r"lhs_contracting_dims=\{([\d,]*)\}", text)
        return 2.0 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(",") if i)

    lhs, rhs, result = re.split(r"_|->", _found(r"dim_labels=([\w>-]+)", text))
    flops = 2.0 * math.prod(out[result.index(label)] for label in "bf") * right[rhs.index("i")]
    window = {key: _found(rf"window=\{{[^}}]*\b{key}=([\dx_\-]+)", text).split("x") for key in WINDOW}
    for i in range(len(lhs) - 2):
        one = {key: (values[i] if values != [""] else "") for key, values in window.items()}
        flops *= _window_pairs(left[lhs.index(str(i))], out[result.index(str(i))], one)
    return flops


WINDOW = ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")


@functools.lru_cache(maxsize=1024)
def _pairs(size: int, out: int, kernel: int, stride: int, low: int, spread: int, step: int) -> int:
    """Pairs of a position of the result and one of the kernel that meet an element of the input."""
    ends = (size - 1) * spread + 1
    places = (o * stride - low + k * step for o in range(out) for k in range(kernel))
    return sum(0 <= place < ends and place % spread == 0 for place in places)


def _window_pairs(size: int, out: int, window: Mapping[str, str]) -> int:
    """As `_pairs`, from the window of one spatial axis."""
    number = {key: int(window[key] or 1) for key in ("size", "stride", "lhs_dilate", "rhs_dilate")}
    low = int(window["pad"].partition("_")[0] or 0)
    return _pairs(
        size, out, number["size"], number["stride"], low, number["lhs_dilate"], number["rhs_dilate"]
    )


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({computation: its instructions}, name of the one that runs first) of an HLO module's text."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            body = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
            body.append(_instruction(found[2], bool(found[1]), line[found.end() :]))
    return computations, entry


def _instruction(name: str, root: bool, rest: str) -> Instruction:
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    inner = rest[len(opcode) :]
    end = _closing(inner)
    operands = re.findall(r"%([\w.\-]+)", inner[:end]) or [inner[1 : end - 1]]
    return Instruction(name, type_, opcode, tuple(operands), inner[end:], root)


def _closing(text: str) -> int:
    """One past the bracket that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i + 1
    return len(text)


def _dims(type_: str) -> list[int]:
    return [int(n) for n in _found(r"\w+\[([\d,]*)\]", type_).split(",") if n]


def size_of(type_: str) -> int:
    """Bytes of an HLO type, of all its arrays where it is a tuple."""
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]", type_):
        bits = 8 if dtype == "pred" else int(_found(r"[a-z]+(\d+)", dtype) or 0)
        total += -(-math.prod(int(n) for n in dims.split(",") if n) * bits // 8)
    return total


def _target(instruction: Instruction) -> str:
    """Whom a custom call calls, in small letters."""
    return _found(r'custom_call_target="([^"]*)"', instruction.attributes).lower()


def _source(instruction: Instruction) -> str:
    return _found(r'op_name="([^"]*)"', instruction.attributes)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""

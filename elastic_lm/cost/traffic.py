"""Bytes that a compiled program reads from a device's memory and writes to it.

Every instruction outside of a fusion reads its operands and writes its result once. Of an array of which only
a slice is read or written, as the layer of a scan over stacked parameters, the slice counts. What lies in
memory on the chip counts nothing.
"""

import re
from collections.abc import Mapping, Sequence

from elastic_lm.cost.compiled import Computations, Instruction, executed, parse, size_of

FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "optimization-barrier"),
)
ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*\[[\d,]*\])(\{[^}]*\})?")
ON_CHIP = re.compile(r"S\(\d+\)")  # memory space 0, that of the device, is not written


def memory_traffic(text: str) -> int:
    """Bytes that one device reads and writes in one call.

    Args:
      text: of an optimised HLO module, from `compiled.Program.text`.

    Example:
      ```python
      import jax
      import jax.numpy as jnp

      from elastic_lm.cost.compiled import compile_program
      from elastic_lm.cost.topologies import described_mesh, parse_topology, placed
      from elastic_lm.cost.traffic import memory_traffic

      x = placed(jnp.zeros((256, 256)), described_mesh(parse_topology("cpu:1")))
      program = compile_program(jax.jit(lambda x: x + 1), x)
      assert memory_traffic(program.text) == 2 * 4 * 256 * 256  # read once, written once
      ```
    """
    computations, entry = parse(text)
    inside_fusions = {
        name
        for body in computations.values()
        for each in body
        if each.opcode == "fusion"
        for name in re.findall(r"calls=%?([\w.\-]+)", each.attributes)
    }
    types = {name: {each.name: each.type for each in body} for name, body in computations.items()}
    total = 0
    for times, _, inside, instruction in executed(computations, entry):
        if inside in inside_fusions or instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            continue
        total += times * _touched(computations, types[inside], instruction)
    return total


def _touched(computations: Computations, types: Mapping[str, str], instruction: Instruction) -> int:
    """Bytes that one instruction reads and writes; `types` are those of its computation."""
    operands = [_in_memory(types.get(name, "")) for name in instruction.operands]
    result = _in_memory(instruction.type)
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * result
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * operands[1 if instruction.opcode == "dynamic-update-slice" else -1]
    if instruction.opcode != "fusion":
        return sum(operands) + result

    found = re.search(r"calls=%?([\w.\-]+)", instruction.attributes)
    body = computations.get(found[1], []) if found else []
    read = sum(min(size, _read(body, i, size)) for i, size in enumerate(operands))
    return read + min(result, _written(body, result))


def _read(body: Sequence[Instruction], index: int, size: int) -> int:
    """Bytes of a fusion's operand that it reads."""
    named = [each for each in body if each.opcode == "parameter" and each.operands == (str(index),)]
    if not named:
        return size
    total, names = 0, [named[0].name]
    while names:
        name = names.pop()
        for user in (each for each in body if name in each.operands):
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
                total += size_of(user.type)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return size
    return total


def _written(body: Sequence[Instruction], size: int) -> int:
    """Bytes of a fusion's result that it writes."""
    by_name = {each.name: each for each in body}
    root = next((each for each in body if each.root), None)
    while root is not None and root.opcode == "bitcast":
        root = by_name.get(root.operands[0])
    if root is None or root.opcode != "dynamic-update-slice":
        return size
    update = by_name.get(root.operands[1])
    return size if update is None else size_of(update.type)


def _in_memory(type_: str) -> int:
    """Bytes of the arrays of a type that lie in the device's memory."""
    return sum(size_of(array) for array, layout in ARRAY.findall(type_) if not ON_CHIP.search(layout))

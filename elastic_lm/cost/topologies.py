"""Devices by name: how many there are, how they hang together, and what is published of each of their chips.

    v5e:4x8, v5p:4x4x4, v6e:2x4       a slice of TPU chips by its shape
    v5litepod-32, v5p-256, v6e-8      the same by the name that the cloud gives it
    a100-80gb:8, h100:8, h100         graphics cards of one machine, by their number
    cpu:8                             simulated devices, for tests

The names of v5e and v6e count chips, those of v5p count its TensorCores, two per chip: v5p-256 has 128 chips.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

GIB = 2**30
WHOLE = PartitionSpec()  # every device holds all of it
AXES = ("data", "fsdp", "tensor")  # of the meshes that training uses (`models.sharding`)
# Nobody is asked for the metadata of a TPU, and two processes may compile at once.
COMPILE_ONLY = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
NO_COMPILER = (
    'compiling for a TPU needs libtpu, a part of the extra `tpu-aot`: pip install "elastic-lm[tpu-aot]"'
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is published of one device.

    Attributes:
      name: as topologies are named.
      platform: "tpu", "cuda" or "cpu".
      hbm_bytes: capacity of its memory.
      flops: peak, in bfloat16, per second.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second and direction of one link to a neighbour.
      links: to neighbours; a ring along one axis of a torus uses two of them.
      per_host: chips of one host in a slice of several hosts.
      axes: axes of a slice's shape.
    """

    name: str
    platform: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float = 0.0
    links: int = 0
    per_host: int = 8
    axes: int = 1

    @property
    def ring_bandwidth(self) -> float:
        """Bytes per second that a chip receives in a ring along one axis: from both sides in a torus."""
        return self.link_bandwidth * min(self.links, 2)


# TPUs: docs.cloud.google.com/tpu/docs/v5e, v5p and v6e. The interconnect's bandwidth is given there for all
# links of a chip: 1,600, 4,800 and 3,200 Gbit/s. GPUs: NVIDIA's data sheets, dense bfloat16, NVLink or PCIe
# per direction.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 16 * GIB, 197e12, 819e9, 50e9, links=4, per_host=4, axes=2),
        Chip("v5p", "tpu", 95 * GIB, 459e12, 2765e9, 100e9, links=6, per_host=4, axes=3),
        Chip("v6e", "tpu", 32 * GIB, 918e12, 1640e9, 100e9, links=4, per_host=4, axes=2),
        Chip("t4", "cuda", 16 * GIB, 65e12, 320e9, 16e9, links=1),  # float16: it has no bfloat16 units
        Chip("l4", "cuda", 24 * GIB, 121e12, 300e9, 32e9, links=1),
        Chip("a100-40gb", "cuda", 40 * GIB, 312e12, 1555e9, 300e9, links=1),
        Chip("a100-80gb", "cuda", 80 * GIB, 312e12, 2039e9, 300e9, links=1),
        Chip("h100", "cuda", 80 * GIB, 989e12, 3350e9, 450e9, links=1),
        Chip("h200", "cuda", 141 * 10**9, 989e12, 4800e9, 450e9, links=1),
        Chip("b200", "cuda", 180 * 10**9, 2250e12, 8000e9, 900e9, links=1),
        Chip("cpu", "cpu", 16 * GIB, 1e11, 20e9, 10e9, links=1, per_host=4096),
    )
}
TORUS_SHAPES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: (
        *((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8)),
        *((8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24)),
    ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind that hang together.

    Attributes:
      chip: what is known of each.
      shape: chips per axis of the torus; one axis where there is none.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Number of machines."""
        return max(1, -(-self.size // self.chip.per_host))

    @property
    def name(self) -> str:
        """As `parse_topology` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.name


def parse_topology(name: str) -> Topology:
    """The topology of a name.

    Args:
      name: such as "v5e:4x8", "v5p-256", "h100:8" or "cpu:8".

    Raises:
      ValueError: nothing is known by this name; says what is.

    Example:
      ```python
      from elastic_lm.cost.topologies import parse_topology

      slice_of_pod = parse_topology("v5p-256")
      assert (slice_of_pod.name, slice_of_pod.size, slice_of_pod.hosts) == ("v5p:4x4x8", 128, 32)
      ```
    """
    known = f"must be one of {', '.join(CHIPS)}, and a shape or number, such as v5e:4x8, v5p-256 or h100:8"
    text = name.strip().lower()
    named = re.fullmatch(r"(v5litepod|v5e|v5p|v6e)-(\d+)", text)
    if named:
        kind, number = named[1].replace("v5litepod", "v5e"), int(named[2])
        return _of_size(name, CHIPS[kind], number // 2 if kind == "v5p" else number)

    kind, _, shape = text.partition(":")
    if kind not in CHIPS or (shape and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)):
        raise ValueError(f"topology={name!r}: {known}")
    chip, sizes = CHIPS[kind], tuple(int(n) for n in (shape or "1").split("x"))
    if chip.axes > 1 and len(sizes) == 1:
        return _of_size(name, chip, sizes[0])
    if len(sizes) != chip.axes:
        raise ValueError(f"topology={name!r}: must be {chip.axes} sizes, such as {kind}:{_example(chip)}")
    if chip.axes > 1 and math.prod(sizes) > 1 and any(n % 2 for n in sizes[:2]):
        raise ValueError(
            f"topology={name!r}: hosts have 2x2 chips; choose even sizes: {kind}:{_example(chip)}"
        )
    return Topology(chip, sizes)


def _of_size(name: str, chip: Chip, number: int) -> Topology:
    for shape in TORUS_SHAPES[chip.axes]:
        if math.prod(shape) == number:
            return Topology(chip, shape)
    numbers = ", ".join(str(math.prod(shape)) for shape in TORUS_SHAPES[chip.axes])
    raise ValueError(
        f"topology={name!r}: no common slice of {chip.name} has {number} chips (there are slices of "
        f"{numbers}); give its shape, such as {chip.name}:{_example(chip)}"
    )


def _example(chip: Chip) -> str:
    return "8" if chip.axes == 1 else "x".join(map(str, TORUS_SHAPES[chip.axes][4]))


def devices(topology: Topology) -> list[Any]:
    """Devices of a topology, to compile for and not to run on.

    Args:
      topology: of TPUs, which need libtpu and no TPU, or of simulated CPU devices.

    Returns:
      jax devices, as many as the topology has.

    Raises:
      ValueError: its compiler is not installed, or this process simulates fewer CPU devices.
    """
    platform = topology.chip.platform
    if platform == "cpu":
        there = jax.devices("cpu")
        if len(there) < topology.size:
            raise ValueError(
                f"topology={topology.name!r}: this process has {len(there)} CPU devices; start it with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.size}"
            )
        return there[: topology.size]
    if platform != "tpu":
        raise ValueError(
            f"topology={topology.name!r}: programs for {topology.chip.name} compile on one alone"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology={topology.name!r}: {NO_COMPILER}")
    return list(_tpus(topology))


@functools.lru_cache(maxsize=32)
def _tpus(topology: Topology) -> tuple[Any, ...]:
    """Devices that libtpu describes."""
    from jax.experimental import topologies

    alone = {"chips_per_host_bounds": [1, 1, 1]} if topology.size == 1 else {}
    with _without_a_tpu():
        described = topologies.get_topology_desc(topology_name=topology.name, platform="tpu", **alone)
    found = tuple(described.devices)
    if len(found) != topology.size:
        raise ValueError(
            f"topology={topology.name!r}: libtpu describes {len(found)} devices, not {topology.size}"
        )
    return found


@contextlib.contextmanager
def _without_a_tpu() -> Iterator[None]:
    """What libtpu must be told where it only compiles; it says on stderr that it found no TPU."""
    before = {name: os.environ.get(name) for name in COMPILE_ONLY}
    os.environ.update({name: value for name, value in COMPILE_ONLY.items() if before[name] is None})
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def described_mesh(topology: Topology, sizes: Sequence[int] = (), names: Sequence[str] = AXES) -> Mesh:
    """A mesh of the devices of a topology.

    Args:
      topology: of TPUs or simulated CPU devices.
      sizes: devices per axis; () = all on the last axis but one, which is fsdp.
      names: of the axes.

    Raises:
      ValueError: the sizes do not fit the topology, or its compiler is not installed.

    Example:
      ```python
      from elastic_lm.cost.topologies import described_mesh, parse_topology

      mesh = described_mesh(parse_topology("cpu:1"))
      assert mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1}
      ```
    """
    sizes = tuple(sizes) or (*(1,) * (len(names) - 2), topology.size, 1)
    if len(sizes) != len(names) or math.prod(sizes) != topology.size:
        raise ValueError(
            f"mesh={tuple(sizes)}: must be {len(names)} sizes whose product is {topology.size}, the devices "
            f"of {topology.name}"
        )
    return Mesh(np.asarray(devices(topology)).reshape(sizes), tuple(names))


def placed(tree: Any, mesh: Mesh, spec: PartitionSpec = WHOLE) -> Any:
    """Shapes and dtypes of a tree, with one sharding for all of it.

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`.
      mesh: from `described_mesh`.
      spec: of every leaf; by default every device holds all of it.
    """
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

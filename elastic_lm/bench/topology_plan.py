"""A training run on devices that are not there: whether it fits, what it takes, and what bounds a step.

The step is the one that training compiles (`train.abstract`). For TPUs and simulated CPU devices it is
compiled, and bytes, FLOPs and collectives are the program's. For graphics cards, whose compiler needs one,
the arguments are counted exactly, FLOPs are those of the step as it is written, and temporaries are
estimated.

A roofline time is the longest of three: FLOPs at the peak in bfloat16, bytes at the bandwidth of the device's
memory, and what the collectives move around rings along one axis of the torus. No step is faster; one that
overlaps nothing takes the sum.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from rich.console import Console
from rich.table import Table

from elastic_lm.config.mesh import MeshConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.cost.compiled import Collective, DoesNotFit, Program, compile_program
from elastic_lm.cost.topologies import GIB, Topology, devices
from elastic_lm.cost.traced import traced_flops
from elastic_lm.cost.traffic import memory_traffic
from elastic_lm.models.registry import Config
from elastic_lm.models.sharding import AXES, make_mesh
from elastic_lm.nn.remat import is_recomputing
from elastic_lm.nn.sequence import SEQUENCE
from elastic_lm.train.abstract import AbstractRun, abstract_run
from elastic_lm.train.config import RunConfig, TaskRun

FOLDER_BANDWIDTH = 1e9  # bytes per second and host from a folder or an object store, assumed
KEPT = 0.95  # share of a graphics card's memory that a program may take: the driver keeps some


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step, by what could bound it."""

    compute: float
    memory: float
    interconnect: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda name: parts[name])

    @property
    def seconds(self) -> float:
        """The longest of them."""
        return max(dataclasses.astuple(self))

    @property
    def without_overlap(self) -> float:
        """All of them, one after the other."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class HostPlan:
    """What each machine reads and writes.

    Attributes:
      hosts: machines.
      rows: of a batch that one of them reads.
      shared_rows: machines that read the same rows, as their devices share layers; 1 = every row once.
      checkpoint_bytes: of a checkpoint, written by all together.
      written_bytes: the most that one host writes.
      read_bytes: the most that one host reads to go on.
      model_bytes: of the model's own folder, which every host reads when a run begins.
      restore_seconds: from a folder of `FOLDER_BANDWIDTH` per host, the checkpoint and the model.
    """

    hosts: int
    rows: int
    shared_rows: int
    checkpoint_bytes: int
    written_bytes: int
    read_bytes: int
    model_bytes: int
    restore_seconds: float


@dataclasses.dataclass(frozen=True)
class TopologyPlan:
    """What a run would take; bytes and FLOPs are those of one device and one step.

    Attributes:
      topology: its name.
      devices: how many.
      mesh: devices per axis.
      method: name of the training method.
      parameters: of the model with its exits.
      trained: of them, those that train.
      tokens: per step, of all devices.
      fits: whether a device holds it.
      available: bytes of a device that programs may use.
      needed: bytes of a device that the step takes, as far as the compiler says where it does not fit.
      held: arguments of the step by what they are, in bytes.
      program: bytes of the compiled step by kind; {} where it does not fit or is not compiled.
      compiled: whether a compiler said so; False = temporaries are estimated.
      flops: of products of matrices.
      traffic: bytes read from and written to a device's memory.
      collectives: by kind and size of their groups.
      roofline: seconds of a step; None where it does not fit.
      host: what machines read and write.
      because: why it does not fit; "" where it does.
      advice: what to try then.
      seconds: that planning took.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    method: str
    parameters: int
    trained: int
    tokens: int
    fits: bool
    available: int
    needed: int
    held: dict[str, int]
    program: dict[str, int]
    compiled: bool
    flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    roofline: Roofline | None
    host: HostPlan
    because: str
    advice: tuple[str, ...]
    seconds: float


def plan_training(
    config: RunConfig | TaskRun, topology: Topology, model: Config | None = None
) -> TopologyPlan:
    """Plans a training run on a topology.

    Args:
      config: the whole run; its data is not read.
      topology: from `cost.topologies.parse_topology`.
      model: of `train.init_from`; None = the config describes a new one.

    Raises:
      ValueError: the run does not fit the mesh, or the compiler is not installed; names field, value and fix.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.bench.topology_plan import plan_training
      from elastic_lm.cost.topologies import parse_topology

      run = el.RunConfig(model=el.testing.tiny_config(), data=el.DataConfig(seq_len=32, batch_size=8))
      plan = plan_training(run, parse_topology("h100:8"))
      assert plan.fits and plan.host.rows == 8
      ```
    """
    start = time.perf_counter()
    mesh = topology_mesh(config.mesh, topology)
    run = abstract_run(config, mesh, model)
    held = held_bytes(run)
    compiles = topology.chip.platform != "cuda"
    program, refusal = None, None
    if compiles:
        try:
            program = compile_program(run.step, run.state, run.frozen, run.batch)
        except DoesNotFit as error:
            refusal = error

    capacity = topology.chip.hbm_bytes if compiles else int(KEPT * topology.chip.hbm_bytes)
    available = refusal.available if refusal and refusal.available else capacity
    if program is not None:
        needed, flops, collectives = program.total, program.flops, program.collectives
        traffic = float(memory_traffic(program.text))
    else:
        traced = jax.make_jaxpr(run.step)(run.state, run.frozen, run.batch)
        flops = (traced_flops(traced, at_most=True) or 0.0) / topology.size
        temporaries = estimated_temporaries(config, run)
        needed = refusal.needed if refusal else sum(held.values()) + temporaries
        needed = max(needed, sum(held.values()))
        collectives, traffic = (), float(2 * sum(held.values()))
    fits = refusal is None and needed <= available
    moved = sum(each.moved for each in collectives)
    chip = topology.chip
    roofline = Roofline(
        flops / chip.flops,
        traffic / chip.hbm_bandwidth,
        moved / chip.ring_bandwidth if topology.size > 1 else 0.0,
    )
    return TopologyPlan(
        topology=topology.name,
        devices=topology.size,
        mesh={name: int(size) for name, size in mesh.shape.items()},
        method=config.method.name,
        parameters=_count(run.state.params) + _count(run.frozen),
        trained=_count(run.state.params),
        tokens=_tokens(run),
        fits=fits,
        available=available,
        needed=needed,
        held=held,
        program=_by_kind(program),
        compiled=compiles,
        flops=flops,
        traffic=traffic,
        collectives=collectives,
        roofline=roofline if fits else None,
        host=host_plan(run, topology),
        because="" if fits else _because(held, needed, available, compiles),
        advice=() if fits else advice(config, run, held, needed, available),
        seconds=time.perf_counter() - start,
    )


def topology_mesh(config: MeshConfig, topology: Topology) -> Any:
    """The mesh of a run on a topology; of graphics cards one without devices, for which nothing compiles.

    Raises:
      ValueError: the sizes do not fit the topology, or its compiler is not installed.
    """
    if topology.chip.platform != "cuda":
        sizes = (config.data, config.fsdp, config.tensor)
        return make_mesh(*sizes, devices=devices(topology), sequence=config.sequence)

    names = AXES if config.sequence == 1 else (*AXES[:-1], SEQUENCE, AXES[-1])
    sizes = [getattr(config, name) for name in names]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = topology.size // max(-math.prod(sizes), 1)
    if min(sizes) < 1 or math.prod(sizes) != topology.size:
        asked = ", ".join(f"{name}={getattr(config, name)}" for name in names)
        raise ValueError(f"mesh {asked} does not fit {topology.size} devices: the product must be that")
    return AbstractMesh(tuple(sizes), names, axis_types=(AxisType.Auto,) * len(names))


def held_bytes(run: AbstractRun) -> dict[str, int]:
    """Bytes of one device that the arguments of a step take, by what they are."""
    params = _device_bytes(run.state.params)
    return {
        "trained parameters": params,
        "optimizer state": _device_bytes(run.state) - params,
        "frozen parameters": _device_bytes(run.frozen),
        "batch": _device_bytes(run.batch),
    }


def estimated_temporaries(config: RunConfig | TaskRun, run: AbstractRun) -> int:
    """Bytes of one device that a step takes beside its arguments, estimated where nothing compiles.

    Gradients; the states between layers, or without remat what their backward pass keeps; the widest layer's
    own arrays; and three arrays of logits of one chunk.
    """
    gradients = _device_bytes(run.state.params)
    model = run.method.config
    rows = jax.tree.leaves(run.batch)[0]
    local = rows.sharding.shard_shape(rows.shape)
    tokens = math.prod(local[:2]) // config.train.accumulate
    size = np.dtype(jax.numpy.dtype(model.dtype)).itemsize
    tensor = run.mesh.shape["tensor"]
    width, neurons, layers = model.d_model, model.d_mlp, model.n_layers
    inner = (6 * width + 3 * neurons) // tensor + 2 * width
    kept = layers * tokens * size * (width if is_recomputing(config.train.remat) else inner + 2 * width)
    chunk = tokens // max(local[1] // config.train.loss_chunk, 1) if len(local) > 1 else 0
    logits = 3 * 4 * chunk * getattr(model, "vocab_size", 0) // tensor
    # Logits of attention in float32, of all heads on a device and at most so many queries at a time.
    length = local[1] if len(local) > 1 else 1
    attention = 2 * 4 * local[0] * model.n_heads // tensor * min(length, 1024) * length
    gathered = _largest_layer(run) * size
    return gradients + kept + tokens * inner * size + logits + attention + gathered


def _largest_layer(run: AbstractRun) -> int:
    """Numbers of one layer's parameters, which fsdp gathers; of stacked layers one."""
    trees = {**run.frozen, **run.state.params}
    layers = trees.get("layers")
    if layers is not None:
        return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(layers))
    return max((_count(tree) for tree in trees.values()), default=0)


def host_plan(run: AbstractRun, topology: Topology) -> HostPlan:
    """What each machine reads and writes, on paper."""
    per_host = -(-topology.size // topology.hosts)
    hosts = _hosts(run.mesh, per_host)
    rows, shared = _rows_per_host(run, hosts)
    written: dict[int, int] = {}
    read: dict[int, int] = {}
    for leaf in jax.tree.leaves(run.state):
        size = leaf.dtype.itemsize
        for host, own, needed in _parts_of_hosts(leaf, run.mesh, hosts):
            written[host] = written.get(host, 0) + own * size
            read[host] = read.get(host, 0) + needed * size
    checkpoint, model = _whole_bytes(run.state), _whole_bytes(run.frozen)
    if not model:  # all of it trains in float32, and was read in its own dtype
        model = _count(run.state.params) * jax.numpy.dtype(run.method.config.param_dtype).itemsize
    most = max(read.values())
    return HostPlan(
        hosts=topology.hosts,
        rows=rows,
        shared_rows=shared,
        checkpoint_bytes=checkpoint,
        written_bytes=max(written.values()),
        read_bytes=most,
        model_bytes=model,
        restore_seconds=(most + model) / FOLDER_BANDWIDTH,
    )


def _hosts(mesh: Any, per_host: int) -> np.ndarray:
    """The machine of every device of a mesh, in the mesh's shape."""
    shape = tuple(mesh.shape.values())
    if isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "tpu":
        return np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return np.arange(math.prod(shape)).reshape(shape) // per_host


def _rows_per_host(run: AbstractRun, hosts: np.ndarray) -> tuple[int, int]:
    """(rows that a machine reads, machines that read the same rows)."""
    data, fsdp = hosts.shape[:2]
    rows = jax.tree.leaves(run.batch)[0].shape[0]
    of_rows: list[set[int]] = [set(hosts[i, j].ravel().tolist()) for i in range(data) for j in range(fsdp)]
    shards = {host: sum(host in each for each in of_rows) for host in np.unique(hosts).tolist()}
    return max(shards.values()) * rows // (data * fsdp), max(map(len, of_rows))


def _parts_of_hosts(leaf: Any, mesh: Any, hosts: np.ndarray) -> Iterable[tuple[int, int, int]]:
    """(host, numbers that it writes, numbers that it reads) of one array; copies are written once."""
    axes = [
        axis for entry in leaf.sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))
    ]
    split = [axis for axis in axes if axis is not None]
    names = list(mesh.shape)
    order = [names.index(axis) for axis in split]
    rest = [i for i in range(len(names)) if i not in order]
    shards = math.prod(mesh.shape[axis] for axis in split)
    by_shard = np.transpose(hosts, order + rest).reshape(shards, -1)  # [shard, copies]
    size = math.prod(leaf.shape) // shards
    owners = np.bincount(by_shard[:, 0], minlength=int(hosts.max()) + 1)
    readers = np.zeros_like(owners)
    for shard in by_shard:
        readers[np.unique(shard)] += 1
    return [(host, int(owners[host]) * size, int(readers[host]) * size) for host in range(len(owners))]


def advice(
    config: RunConfig | TaskRun, run: AbstractRun, held: Mapping[str, int], needed: int, available: int
) -> tuple[str, ...]:
    """What would make a run smaller, the cheapest first; each names the option and what it saves."""
    train, mesh = config.train, run.mesh.shape
    section, rows = (
        ("task", config.task.batch_size)
        if isinstance(config, TaskRun)
        else (
            "data",
            config.data.batch_size,
        )
    )
    recomputes = any(field.name == "remat" for field in dataclasses.fields(run.method))  # pyright: ignore[reportArgumentType]
    unit = mesh["data"] * mesh["fsdp"]
    held_all, found = sum(held.values()), []
    temporaries = max(needed - held_all, 0)
    if temporaries > 0.1 * available:
        if recomputes and not is_recomputing(train.remat):
            found.append("train.remat=True (layers are computed again in the backward pass)")
        if rows // train.accumulate >= 2 * unit:
            found.append(
                f"train.accumulate={2 * train.accumulate} (half of the rows at a time, the same update)"
            )
            found.append(f"{section}.batch_size={rows // 2}")
        if isinstance(config, RunConfig) and train.loss_chunk > 64:
            found.append(f"train.loss_chunk={train.loss_chunk // 2} (fewer logits at a time)")
    if held["optimizer state"] > 0.05 * available and train.mu_dtype != "bfloat16":
        saved = held["optimizer state"] / 4
        found.append(f'train.mu_dtype="bfloat16" (saves {gib(saved)} of moments)')
    if held["frozen parameters"] > 0.1 * available and _itemsize(run.frozen) > 2:
        found.append(
            f'train.param_dtype="bfloat16" (saves {gib(held["frozen parameters"] / 2)} of frozen weights)'
        )
    if mesh["data"] > 1:
        fsdp = mesh["data"] * mesh["fsdp"]
        saved = held_all * (1 - 1 / mesh["data"])
        found.append(
            f"mesh.fsdp={fsdp} and mesh.data=1 (parameters in {fsdp} slices, saves about {gib(saved)})"
        )
    elif mesh["fsdp"] > 1 and _divides(run, 2 * mesh["tensor"]):
        found.append(f"mesh.tensor={2 * mesh['tensor']} (heads and neurons shared by more devices)")
    found.append("more devices, or devices with more memory")
    return tuple(found)


def _divides(run: AbstractRun, tensor: int) -> bool:
    """Whether so many devices can share the heads of a decoder."""
    model = run.method.config
    return isinstance(model, ModelConfig) and model.n_kv_heads % tensor == 0 and model.d_mlp % tensor == 0


def _because(held: Mapping[str, int], needed: int, available: int, compiled: bool) -> str:
    parts = {**held, "temporaries": max(needed - sum(held.values()), 0)}
    largest = sorted(parts, key=lambda name: -parts[name])[:2]
    what = " and ".join(f"{name} ({gib(parts[name])})" for name in largest)
    about = "" if compiled else "about "
    return f"a step needs {about}{gib(needed)} of the {gib(available)} that a device has, most of it {what}"


def _by_kind(program: Program | None) -> dict[str, int]:
    if program is None:
        return {}
    kinds = ("arguments", "outputs", "aliased", "temporaries", "code", "total")
    return {kind: getattr(program, kind) for kind in kinds}


def _device_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _whole_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _itemsize(tree: Any) -> int:
    return max((leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)), default=0)


def _tokens(run: AbstractRun) -> int:
    """Tokens of a batch, which its widest integers are."""
    return max(math.prod(leaf.shape[:2]) for leaf in jax.tree.leaves(run.batch))


def to_json(plan: TopologyPlan) -> dict[str, Any]:
    """The plan as JSON values."""
    values = dataclasses.asdict(plan)
    for each, collective in zip(values["collectives"], plan.collectives, strict=True):
        each["moved"] = collective.moved
        each["names"] = list(each["names"])
    if plan.roofline is not None:
        values["roofline"] |= {"bound": plan.roofline.bound, "seconds": plan.roofline.seconds}
    values["folder_bandwidth"] = FOLDER_BANDWIDTH
    return values


def gib(size: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}" if size < 100 * scale else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


def show_plan(plan: TopologyPlan, console: Console) -> None:
    """Prints a plan."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.print(
        f"{plan.method} on {plan.topology}: {plan.devices} devices of {plan.host.hosts} "
        f"{'host' if plan.host.hosts == 1 else 'hosts'}; mesh {mesh}; {plan.parameters:,} parameters, of "
        f"which {plan.trained:,} train; {plan.tokens:,} tokens a step"
    )
    sizes = Table("bytes of one device", "", box=None)
    for name, size in plan.held.items():
        sizes.add_row(name, gib(size))
    if plan.program:
        beside = plan.program["outputs"] - plan.program["aliased"]
        sizes.add_row("results that are not in the arguments' place", gib(beside))
        sizes.add_row("temporaries", gib(plan.program["temporaries"]))
        sizes.add_row("the program", gib(plan.program["code"]))
    else:
        about = "temporaries" if plan.compiled else "temporaries, estimated"
        sizes.add_row(about, gib(max(plan.needed - sum(plan.held.values()), 0)))
    sizes.add_row("together", f"{gib(plan.needed)} of {gib(plan.available)}")
    console.print(sizes)
    if plan.collectives:
        table = Table("collective", "devices", "runs a step", "places", "bytes a step", box=None)
        for each in plan.collectives:
            table.add_row(each.kind, str(each.group), f"{each.count:,}", str(each.sites), gib(each.bytes))
        console.print(table)
    if plan.roofline is not None:
        _show_times(plan, console)
    _show_hosts(plan.host, console)
    if plan.fits:
        about = "" if plan.compiled else " (temporaries are estimated: its compiler needs such a card)"
        console.print(f"fits: {gib(plan.needed)} of {gib(plan.available)} on every device{about}")
    else:
        console.print(f"does not fit: because {plan.because}; try {'; or '.join(plan.advice)}")


def _show_times(plan: TopologyPlan, console: Console) -> None:
    roofline = plan.roofline
    assert roofline is not None
    parts = {
        "compute": plan.flops,
        "memory": plan.traffic,
        "interconnect": sum(c.moved for c in plan.collectives),
    }
    what = {
        "compute": f"{parts['compute']:.3e} FLOPs",
        "memory": f"{gib(parts['memory'])} read and written",
        "interconnect": f"{gib(parts['interconnect'])} received",
    }
    times = dataclasses.asdict(roofline)
    shown = "; ".join(f"{name} {1e3 * times[name]:.1f} ms ({what[name]})" for name in times)
    console.print(f"a step, at the published peaks: {shown}")
    counted = "" if plan.compiled else "; neither temporaries nor collectives are in it"
    console.print(
        f"at least {1e3 * roofline.seconds:.1f} ms, bound by {roofline.bound}; "
        f"{1e3 * roofline.without_overlap:.1f} ms where nothing overlaps; at most "
        f"{plan.tokens / roofline.seconds:,.0f} tokens/s{counted}"
    )


def _show_hosts(host: HostPlan, console: Console) -> None:
    same = "every row on one host" if host.shared_rows == 1 else f"the same rows on {host.shared_rows} hosts"
    console.print(
        f"data: {host.rows} rows of a batch per host, {same}\n"
        f"checkpoint: {gib(host.checkpoint_bytes)}, of which a host writes at most "
        f"{gib(host.written_bytes)}; to go on it reads {gib(host.read_bytes)} and the model, "
        f"{gib(host.model_bytes)}: {host.restore_seconds:.1f} s at {FOLDER_BANDWIDTH / 1e9:g} GB/s per host"
    )

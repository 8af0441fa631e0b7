"""A process that saves a state through `Checkpoints`, or restores it onto its own devices and compares.

Arguments: save or restore, folder. Run by `test_spread.py`.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import elastic_lm as el
from elastic_lm.checkpoints.native import Checkpoints

SHARDS = 8
WHOLE = {
    "spread": np.arange(64.0, dtype=np.float32).reshape(16, 4),
    "half": np.linspace(0, 1, 24).reshape(8, 3).astype(jnp.bfloat16),
    "same": np.asarray([3, 1, 4], np.int32),
}


class Batches:
    """A data iterator of which every process reads some shards."""

    def __init__(self, index: int, count: int, step: int) -> None:
        self.shards = {str(i): (step, i) for i in range(index, SHARDS, count)}

    def get_state(self) -> Any:
        return {"shards": dict(self.shards)}

    def set_state(self, state: Any) -> None:
        self.shards = {number: state["shards"][number] for number in self.shards}


def placed(whole: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))

    def one(name: str, value: np.ndarray) -> jax.Array:
        spec = PartitionSpec() if name == "same" else PartitionSpec("fsdp")
        return jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, spec), lambda place: value[place]
        )

    return {name: one(name, value) for name, value in whole.items()}


def main(what: str, folder: Path) -> None:
    el.start_processes(timeout=120)
    index, count = jax.process_index(), jax.process_count()
    with Checkpoints(folder) as checkpoints:
        if what == "save":
            for step in (1, 2):
                state = placed({name: value + value.dtype.type(step) for name, value in WHOLE.items()})
                batches: Any = Batches(index, count, step)
                checkpoints.save(step, state, batches)
                # What a step does to its state must not reach the copy.
                jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(state)
            return

        batches = Batches(index, count, 0)
        like = placed(WHOLE)
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in like.items()
        }
        found = checkpoints.restore(abstract, batches)
        assert found is not None
        assert found[0] == 2
        assert set(batches.shards.values()) == {(2, i) for i in range(index, SHARDS, count)}
        for name, value in WHOLE.items():
            due = value + value.dtype.type(2)
            for shard in found[1][name].addressable_shards:
                assert np.array_equal(np.asarray(shard.data), due[shard.index]), name


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

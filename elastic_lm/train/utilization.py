"""How much of the devices a run uses: FLOPs of its steps by the peak of the devices, speed per chip, memory.

    mfu = F / (s C p)

with F FLOPs of a step, without what its backward pass computes again to save memory, s seconds of a step, C
devices and their peak p in bfloat16, whatever the step computes in.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from elastic_lm.cost.device_kinds import chip_of
from elastic_lm.cost.traced import traced_flops
from elastic_lm.report.machine import memory_in_use_bytes
from elastic_lm.report.writers import PER_CHIP


class Utilization:
    """What the numbers of a run say about its devices."""

    def __init__(self, mesh: Mesh, rate: str, tflops: float = 0.0) -> None:
        """Nothing is counted yet.

        Args:
          mesh: of the run.
          rate: name of what is counted per second.
          tflops: peak of one device; 0 = as published.
        """
        self._devices = mesh.devices.size
        self._rate = rate
        chip = chip_of(mesh.devices.flat[0].device_kind)
        self._peak = 1e12 * tflops or (chip.flops if chip else None)
        self._counted: dict[Any, float | None] = {}
        self._flops: list[float | None] = []  # of the steps since the last line

    def counting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step, which counts its FLOPs by the shapes of its batches, if the peak of the devices is known.

        Args:
          step: jitted: (state, frozen, batch) -> (state, metrics).
        """
        if self._peak is None:
            return step

        def counted(state: Any, frozen: Any, batch: Any) -> Any:
            shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch))
            if shapes not in self._counted:
                # JAX keeps the trace for the call below.
                self._counted[shapes] = traced_flops(step.trace(state, frozen, batch).jaxpr)
            self._flops.append(self._counted[shapes])
            return step(state, frozen, batch)

        return counted

    def numbers(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What a line of metrics says besides.

        Args:
          metrics: of the steps since the last line.
        """
        found = {f"{self._rate}{PER_CHIP}": metrics[self._rate] / self._devices}
        flops, self._flops = self._flops, []
        known = [each for each in flops if each is not None]
        if self._peak and known and len(known) == len(flops):
            a_step = sum(known) / len(known)
            found["mfu"] = a_step / (metrics["step_seconds"] * self._devices * self._peak)
        memory = memory_in_use_bytes()
        return found if memory is None else {**found, "memory_gib": memory / 2**30}

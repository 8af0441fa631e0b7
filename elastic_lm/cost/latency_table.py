"""Latency tables: milliseconds of every module and choice of a menu on one device, and their file.

    time(subnet) = fixed + sum over its layers of attention[layer][heads][groups] + mlp[layer][neurons]

There is one such table per phase: `decode` is one token of every sequence of the batch, with `context`
positions in the caches, and `prefill` is the prompts of the whole batch, `context` tokens each. A table
belongs to the sizes of a model, a menu, a batch and context, and a device: `LatencyTable.check` refuses it
where one of them differs, before its costs go into a search.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import load_dataclass
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.cost.counted import CostTable, Workload
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.files.remote import fetched
from elastic_lm.report.machine import hardware

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
FORMAT = "elastic_lm latency table 1"
REBUILD = "measure again: elastic-lm latency build"
CHOICES = ("mlp", "heads", "groups")  # fields of a menu that a table has costs of

# Fields of `ModelConfig` that change what is computed, but not how long it takes.
TIMELESS = (
    "exits", "family", "bos_id", "eos_ids", "max_len", "rope", "elastic_groups", "norm_eps", "norm_offset",
    "attn_scale", "embed_scale", "residual_scale", "logit_scale", "local_rope",
    "query_growth", "position_offset", "alibi_scale", "alibi_rounded",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Device:
    """What computes. Times of one device say nothing about another.

    Example:
      ```python
      import elastic_lm as el

      device = el.width.Device.here()
      print(device.platform, device.kind, device.cores)
      ```
    """

    platform: str  # cpu, gpu or tpu
    kind: str  # the device's name in jax
    processor: str  # of the host
    cores: int  # of the host that the process may use

    @classmethod
    def here(cls) -> "Device":
        """The device that this process computes on."""
        found = hardware()
        return cls(
            platform=found["backend"],
            kind=found["devices"][0],
            processor=found["processor"],
            cores=found["cores"],
        )

    def check(self, source: str) -> None:
        """Checks that this is the device of this process.

        Args:
          source: what was measured on this device, for the message.

        Raises:
          ValueError: it is another; names what differs.
        """
        here = Device.here()
        # The host counts only where it computes itself.
        fields = ("platform", "kind", *(("processor", "cores") if self.platform == "cpu" else ()))
        for field in fields:
            value, found = getattr(self, field), getattr(here, field)
            require(
                value == found,
                f"{source}: device.{field}",
                value,
                f"this device has {found!r}, and times of another say nothing about it; {REBUILD}",
            )


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds of every module and choice of a menu, on one device.

    `elastic-lm latency build` measures one. `SubnetChooser.with_latency` chooses by it.

    Raises:
      ValueError: the costs are not those of the menu's choices, or not finite; names field, value and fix.

    Example:
      ```python
      import dataclasses
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      config, menu = tiny_config(), el.Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0))
      counted = el.width.counted_table(config, menu, "parameters")
      costs = dataclasses.replace(counted, kind="latency_ms")  # made up: in earnest they are measured
      table = el.LatencyTable(
          model=config,
          menu=menu,
          workload=el.width.Workload(batch=1, context=32),
          device=el.width.Device.here(),
          decode=costs,
          prefill=costs,
          residuals={"decode": 0.0, "prefill": 0.0},
          rounds=1,
          date="2026-01-01T00:00:00",
          versions={},
      )
      print(table.total(menu.smallest(config)), table.total(menu.largest(config)))
      ```
    """

    model: ModelConfig  # the whole model, without exits
    menu: Menu  # whose choices were measured
    workload: Workload  # batch and context they were measured at
    device: Device  # that they were measured on
    decode: CostTable  # of one decoding step of the whole batch
    prefill: CostTable  # of the prompts of the whole batch, `workload.context` tokens each
    residuals: Mapping[str, float]  # phase -> root mean square of fitted / measured - 1
    rounds: int  # timed runs of every program
    date: str  # in UTC, ISO 8601
    versions: Mapping[str, str]  # of the packages that matter to speed
    path: str = ""  # of the model that was timed; "" = one with random weights, or not recorded
    weights: str = ""  # fingerprint of its weights; "" likewise

    def __post_init__(self) -> None:
        # Numbers of choices of every layer: neurons, heads, and groups once for each choice of heads.
        sizes = self.menu.sizes(self.model)
        choices = zip(sizes.mlp, sizes.heads, sizes.groups, strict=True)
        wanted = [(len(mlp), len(heads), *[len(groups)] * len(heads)) for mlp, heads, groups in choices]

        for phase in PHASES:
            costs: CostTable = getattr(self, phase)
            require(costs.kind == "latency_ms", f"{phase}.kind", costs.kind, "must be latency_ms")

            found = [(len(m), len(a), *map(len, a)) for m, a in zip(costs.mlp, costs.attention, strict=True)]
            require(
                found == wanted,
                phase,
                f"costs of {len(found)} layers",
                f"does not hold one number for each choice of {self.menu} in {self.model.n_layers} layers",
            )

            numbers = [costs.fixed, *itertools.chain(*costs.mlp, *itertools.chain(*costs.attention))]
            worst = next((x for x in numbers if not 0 <= x < math.inf), 0.0)
            require(worst == 0, phase, worst, "milliseconds must be at least 0 and finite")

            residual = self.residuals.get(phase)
            require(isinstance(residual, float), f"residuals.{phase}", residual, "must be a number")

    def total(self, subnet: Subnet, phase: Phase = "decode") -> float:
        """Predicted milliseconds of a sub-network.

        Args:
          subnet: chosen from the menu, with all channels.
          phase: "decode", per step of the whole batch, or "prefill", per prompts of the whole batch.

        Returns:
          Milliseconds.

        Raises:
          ValueError: a size is not on the menu, or channels are left out.
        """
        return getattr(self, phase).total(self.model, self.menu, subnet)

    def check(self, config: ModelConfig, menu: Menu | None = None, source: str = "latency table") -> None:
        """Checks that this table is about a model on the device of this process.

        Args:
          config: the whole model; exits do not matter.
          menu: whose choices are looked up; None = the table's own.
          source: the table's name in messages, e.g. its file.

        Raises:
          ValueError: it is about another model, menu or device; names the first field that differs.
        """
        for field in (f.name for f in dataclasses.fields(ModelConfig) if f.name not in TIMELESS):
            value, wanted = getattr(self.model, field), getattr(config, field)
            require(
                value == wanted,
                f"{source}: model.{field}",
                value,
                f"this model has {wanted!r}; name the table's model with --model, or {REBUILD}",
            )

        # Menus may differ in their shares, as long as these give the same sizes.
        menu = menu or self.menu
        sizes, wanted_sizes = self.menu.sizes(self.model), menu.sizes(config)
        for field in CHOICES:
            wanted = getattr(menu, field)
            require(
                getattr(sizes, field) == getattr(wanted_sizes, field),
                f"{source}: menu.{field}",
                getattr(self.menu, field),
                f"this menu has {wanted}; {REBUILD} --{field} {_listed(wanted)}",
            )

        require(
            bool(self.menu.dropped) or not menu.dropped,
            f"{source}: menu.dropped",
            self.menu.dropped,
            f"this menu drops layers {menu.dropped}, of which no time is known; {REBUILD} with --model",
        )
        self.device.check(source)

    def checked(self, config: ModelConfig, menu: Menu, source: str = "latency table") -> CostTable:
        """Milliseconds per decoded step of the whole batch, after `check`.

        Args:
          config: the whole model; exits do not matter.
          menu: whose choices are looked up.
          source: the table's name in messages, e.g. its file.

        Returns:
          The table `decode`.

        Raises:
          ValueError: it is about another model, menu or device; names the first field that differs.
        """
        self.check(config, menu, source)
        return self.decode

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON; a crash never leaves half a file."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_text_whole(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Reads a table; `check` says whether it is about this device and a model.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is not JSON, not a latency table, or holds values out of range.
        """
        return load_dataclass(cls, fetched(path), FORMAT, "latency table", REBUILD)

    def text(self) -> str:
        """The table as aligned lines, one per choice; layers of equal costs share their lines."""
        batch, context = self.workload.batch, self.workload.context
        fits = ", ".join(f"{phase} {self.residuals[phase]:.1%}" for phase in PHASES)
        lines = [
            f"milliseconds at batch {batch} after {context} tokens; the fit is off by {fits}",
            f"{'':44}{'step':>10}{'prompts':>12}",
            _line("whole model", self, lambda t: t.range(self.menu)[1]),
            _line("embeddings, vocabulary head, calls", self, lambda t: t.fixed),
        ]

        sizes = self.menu.sizes(self.model)
        for i, layers in self._equal_layers().items():
            lines.append(f"each of layers {_listed(layers)}" if len(layers) > 1 else f"layer {i}")
            for j, n in enumerate(sizes.mlp[i]):
                lines.append(_line(f"  MLP of {n} neurons", self, lambda t, i=i, j=j: t.mlp[i][j]))
            pairs = itertools.product(enumerate(sizes.heads[i]), enumerate(sizes.groups[i]))
            for (h, heads), (g, groups) in pairs:
                name = f"  attention of {groups} groups of {heads} heads"
                lines.append(_line(name, self, lambda t, i=i, h=h, g=g: t.attention[i][h][g]))
        return "\n".join(lines)

    def _equal_layers(self) -> dict[int, list[int]]:
        """First layer -> layers of the same sizes and costs."""
        sizes = self.menu.sizes(self.model)
        found: dict[object, list[int]] = {}
        for i in range(self.model.n_layers):
            costs = [(t.mlp[i], t.attention[i]) for t in (self.decode, self.prefill)]
            found.setdefault((sizes.mlp[i], sizes.heads[i], sizes.groups[i], *costs), []).append(i)
        return {layers[0]: layers for layers in found.values()}


def _line(name: str, table: LatencyTable, cost: Callable[[CostTable], float]) -> str:
    """A line with one cost in both phases."""
    return f"{name:44}{cost(table.decode):>10.4g}{cost(table.prefill):>12.4g}"


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:.12g}" for value in values)

"""Checks a latency table: sub-networks that it never saw are timed again. Rows:

- latency/median_error: median |predicted / measured - 1| of the decoding steps of random sub-networks;
  ideal = the 10 % that are allowed. Smaller is better.
- latency/prefill_median_error: the same for prompts.
- latency/full_vs_table: milliseconds per step of the full model now; ideal = the table's. Away from 1 the
  machine is not as fast as it was when the table was built.
- latency/half_width_vs_ideal: time per step with half the neurons and half the heads relative to the full
  model's, of the same rounds; ideal = the ratio of the bytes that a step reads. Smaller is better. Where
  heads share no key/value group, half the groups stand for half the heads.
"""

import contextlib
import dataclasses

import numpy as np

from elastic_lm.bench.latency_build import programs
from elastic_lm.bench.latency_measure import Progress, measure
from elastic_lm.bench.report import Measurement
from elastic_lm.bench.timing import bandwidth_note
from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.cost.counted import model_cost
from elastic_lm.cost.latency_table import LatencyTable
from elastic_lm.models.decoder import Params

ALLOWED = 0.10  # median error of a table that is good enough


@dataclasses.dataclass(frozen=True)
class Checked:
    """One sub-network, predicted and measured; milliseconds."""

    subnet: Subnet
    predicted: float  # per decoded step, by the table
    measured: float
    prefill_predicted: float  # per prompts of the whole batch
    prefill_measured: float


def verify(
    table: LatencyTable,
    config: ModelConfig,
    *,
    params: Params | None = None,
    count: int,
    rounds: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Measurement], list[Checked]]:
    """Times random sub-networks of a table's menu and compares with what it predicts.

    Args:
      table: measured on this device.
      config: the whole model.
      params: its canonical parameters; None = random ones, which take as long.
      count: random sub-networks.
      rounds: timed runs of each.
      seed: of prompts, random parameters and sub-networks; the latter are not those of `build`.
      progress: makes what shows how far it is; None = nothing does.

    Returns:
      (the rows above, the random sub-networks). The last row is missing where the model cannot be halved.

    Raises:
      ValueError: the table is of another model or device, or a number is out of range.
    """
    table.check(config)
    require(count >= 1, "count", count, "must be at least 1 sub-network")
    config = config.with_exits(())
    rng = np.random.default_rng((seed, 1))
    subnets = _unseen(table, config, count, rng, seed)
    half = half_width(config)
    timed = [*subnets, *([half] if half else [])]
    found = measure(config, params, timed, table.workload, rounds=rounds, seed=seed, progress=progress)
    decode, prefill = (found.full[phase] * found.relative[phase] for phase in ("decode", "prefill"))
    checked = [
        Checked(s, table.total(s), float(decode[i]), table.total(s, "prefill"), float(prefill[i]))
        for i, s in enumerate(subnets)
    ]
    error = [abs(c.predicted / c.measured - 1) for c in checked]
    prefill_error = [abs(c.prefill_predicted / c.prefill_measured - 1) for c in checked]
    read = bandwidth_note(config, table.workload, found.full["decode"] / 1e3)
    full = Measurement.of("latency/full_vs_table", found.full["decode"], table.total(Subnet.full(config)))
    rows = [
        Measurement.of("latency/median_error", float(np.median(error)), ALLOWED),
        Measurement.of("latency/prefill_median_error", float(np.median(prefill_error)), ALLOWED),
        dataclasses.replace(full, note=read),
    ]
    if half:
        read = [model_cost(s.sliced(config), table.workload).read_bytes for s in (half, Subnet.full(config))]
        ratio = float(found.relative["decode"][-1])
        rows.append(Measurement.of("latency/half_width_vs_ideal", ratio, read[0] / read[1]))
    return rows, checked


def _unseen(
    table: LatencyTable, config: ModelConfig, count: int, rng: np.random.Generator, seed: int
) -> list[Subnet]:
    """Random sub-networks that the table was not fitted to; fewer, or seen ones, where a menu is small."""
    seen = set(programs(config, table.menu, seed))
    drawn = dict.fromkeys(table.menu.sample(config, rng) for _ in range(20 * count))
    unseen = [subnet for subnet in drawn if subnet not in seen]
    return (unseen or list(drawn))[:count]


def half_width(config: ModelConfig) -> Subnet | None:
    """Half the neurons and half the heads of every group, or half the groups; None where neither divides."""
    for shares in ((0.5, 1.0), (1.0, 0.5)):
        with contextlib.suppress(ValueError):
            return Subnet.uniform(config, mlp=0.5, heads=shares[0], groups=shares[1])
    return None


def text(checked: list[Checked]) -> str:
    """One line per sub-network, as aligned columns.

    Args:
      checked: from `verify`.
    """
    lines = ["layers  mean neurons  mean heads   predicted    measured  predicted / measured"]
    for c in checked:
        heads = np.multiply(c.subnet.heads, c.subnet.groups)
        sizes = f"{len(c.subnet.layers):>6}{np.mean(c.subnet.mlp):>14.0f}{np.mean(heads):>12.2f}"
        times = f"{c.predicted:>9.4g} ms{c.measured:>9.4g} ms{c.predicted / c.measured:>22.3f}"
        lines.append(sizes + times)
    return "\n".join(lines)

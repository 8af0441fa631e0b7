"""Times of sub-networks: the table that budgets are met by, and what was chosen, timed in the end."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
from study import MENU, elastic_config, key

from elastic_lm.cost import CostTable, Load
from elastic_lm.elastic import Subnet
from elastic_lm.latency.build import cost_table, counted_shares, design, fit, programs
from elastic_lm.latency.measure import GROUP, measure
from elastic_lm.latency_table import PHASES, Device, LatencyTable, Phase
from elastic_lm.machine import versions
from elastic_lm.plain import from_dict

LOAD = Load(batch=1, context=128)
RANDOM = 8  # random sub-networks that a table is fitted to, beside the chosen ones
UNTIMED = ("random", "full")  # drawn too often, and 1 by definition


def latency_table(base: str, out: Path, rounds: int) -> LatencyTable:
    """The table of the base on this device, from OUT/latency.json where it is there already.

    Unlike `latency.build` it is fitted to sub-networks with all layers alone. A model of half the layers
    lies in cache where the whole one does not, so that its time says little about narrow models.
    """
    file = out / "latency.json"
    if not file.is_file():
        built(base, rounds).save(file)
    table = LatencyTable.load(file)
    table.check(elastic_config(base), MENU, str(file))
    print(table.text(), flush=True)
    return table


def built(base: str, rounds: int) -> LatencyTable:
    """Measures the table."""
    config, rng = elastic_config(base), np.random.default_rng(1)
    subnets = [s for s in programs(config, MENU, 0) if len(s.layers) == config.n_layers]
    subnets += [MENU.sample(config, rng) for _ in range(RANDOM)]
    measured = measure(config, None, subnets[1:], LOAD, rounds=rounds)
    costs: dict[Phase, CostTable] = {}
    residuals: dict[str, float] = {}
    for phase in PHASES:
        ratios = np.asarray([1.0, *measured.relative[phase]])
        prior = counted_shares(config, MENU, LOAD, phase)
        shares, residuals[phase] = fit(design(config, MENU, subnets), ratios, prior)
        costs[phase] = cost_table(config, MENU, shares * measured.full[phase])
    return LatencyTable(
        config,
        MENU,
        LOAD,
        Device.here(),
        **costs,
        residuals=residuals,
        rounds=rounds,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )


def timed(table: LatencyTable, runs: list[dict[str, Any]], out: Path, rounds: int) -> dict[str, float]:
    """Time per decoded token of every chosen sub-network, the whole model's of the same rounds being 1."""
    file = out / "times.json"
    times: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    rows = [row for run in runs for row in run["rows"] if row["subnet"] and row["how"] not in UNTIMED]
    left = [subnet for row in rows if key(subnet := row["subnet"]) not in times]
    left = list({key(subnet): subnet for subnet in left}.values())
    for i in range(0, len(left), GROUP):
        group = [from_dict(Subnet, subnet) for subnet in left[i : i + GROUP]]
        found = measure(table.model, None, group, table.workload, rounds=rounds)
        new = zip(map(key, left[i : i + GROUP]), found.relative["decode"].tolist(), strict=True)
        times |= dict(new)
        file.write_text(json.dumps(times, indent=1) + "\n")
    return times

"""Times of sub-networks: the table that budgets are met by, and what was chosen, timed in the end."""

import json
from pathlib import Path
from typing import Any

from study import MENU, elastic_config, key

import elastic_lm as el
from elastic_lm.bench.latency_build import build
from elastic_lm.bench.latency_measure import GROUP, measure
from elastic_lm.config.parse import from_dict

WORKLOAD = el.width.Workload(batch=1, context=128)
UNTIMED = ("random", "full")  # drawn too often, and 1 by definition


def latency_table(base: str, out: Path, rounds: int) -> el.LatencyTable:
    """The table of the base on this device, from OUT/latency.json where it is there already."""
    file = out / "latency.json"
    if not file.is_file():
        build(elastic_config(base), MENU, WORKLOAD, rounds=rounds).save(file)
    table = el.LatencyTable.load(file)
    table.check(elastic_config(base), MENU, str(file))
    print(table.text(), flush=True)
    return table


def timed(table: el.LatencyTable, runs: list[dict[str, Any]], out: Path, rounds: int) -> dict[str, float]:
    """Time per decoded token of every chosen sub-network, the whole model's of the same rounds being 1."""
    file = out / "times.json"
    times: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    rows = [row for run in runs for row in run["rows"] if row["subnet"] and row["how"] not in UNTIMED]
    left = [subnet for row in rows if key(subnet := row["subnet"]) not in times]
    left = list({key(subnet): subnet for subnet in left}.values())
    for i in range(0, len(left), GROUP):
        group = [from_dict(el.Subnet, subnet) for subnet in left[i : i + GROUP]]
        found = measure(table.model, None, group, table.workload, rounds=rounds)
        new = zip(map(key, left[i : i + GROUP]), found.relative["decode"].tolist(), strict=True)
        times |= dict(new)
        file.write_text(json.dumps(times, indent=1) + "\n")
    return times

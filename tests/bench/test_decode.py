"""The decode benchmark, on a model that only shows that it runs."""

import numpy as np

from elastic_lm.bench import decode
from elastic_lm.bench.report import Options


def test_rows_and_compilations():
    rows = {row.name: row for row in decode.rows(Options(tiny=True, rounds=1))}
    names = {"full_vs_bandwidth", "exits_never", "exit_half", "compilations"}
    assert {f"decode/{name}" for name in names} <= set(rows)
    assert rows["decode/compilations"].ratio == 1.0
    assert all(np.isfinite((row.measured, row.ideal)).all() for row in rows.values())
    differences = {"decode/gate_vs_head"}  # of timings: of either sign on a model this small
    assert all(row.ideal > 0 for name, row in rows.items() if name not in differences)

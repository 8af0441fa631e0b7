"""The benchmark of widths, on a model that only shows that it runs."""

import numpy as np
import pytest

from elastic_lm.bench import widths
from elastic_lm.bench.report import Options, names


@pytest.mark.long
def test_rows() -> None:
    assert "widths" in names()
    found = {row.name: row for row in widths.rows(Options(tiny=True, rounds=1))}
    each = ("nested_whole", "nested_half", "nested_half_vs_whole")
    assert set(found) == {f"widths/{name}{suffix}" for name in each for suffix in ("", "_batch8")}
    assert all(np.isfinite((row.measured, row.ideal, row.ratio)).all() for row in found.values())

"""The training benchmark, on a model that only shows that it runs."""

import numpy as np
import pytest

from elastic_lm.bench import train
from elastic_lm.bench.report import Options


def test_rows():
    rows = {row.name: row for row in train.rows(Options(tiny=True, rounds=1))}
    names = ("ee_tuning", "self_supervised", "self_supervised_cached", "soft8")
    assert set(rows) == {*(f"train/{name}_vs_sft" for name in names), "train/soft8_memory_vs_sft"}
    for row in rows.values():
        assert np.isfinite(row.measured)
        assert row.ideal > 0
        assert row.ratio > 0
    memory = rows["train/soft8_memory_vs_sft"]
    assert memory.ratio == memory.measured / memory.ideal


def test_a_model_is_refused():
    with pytest.raises(
        ValueError, match="--model x: bench train measures a model of its own; leave --model out"
    ):
        train.rows(Options(tiny=True, model="x"))

"""The training benchmark, on a model that only shows that it runs."""

import re

import chex
import numpy as np
import pytest

from elastic_lm.bench import train
from elastic_lm.bench.report import Options
from elastic_lm.testing import tiny_config
from elastic_lm.width.elastic_training import ElasticTraining


@pytest.mark.long
def test_rows():
    rows = {row.name: row for row in train.rows(Options(tiny=True, rounds=1))}
    names = ("ee_tuning", "self_supervised", "self_supervised_cached", "elastic", "soft8")
    assert set(rows) == {*(f"train/{name}_vs_sft" for name in names), "train/soft8_memory_vs_sft"}
    for row in rows.values():
        assert np.isfinite(row.measured)
        assert row.ideal > 0
        assert row.ratio > 0
    memory = rows["train/soft8_memory_vs_sft"]
    assert memory.ratio == memory.measured / memory.ideal
    note = rows["train/elastic_vs_sft"].note
    assert re.fullmatch(r"16 sub-networks in 8 steps, \d+ of them the smallest; with 0\.\d\d of .*", note)


def test_elastic_steps_draw_the_same_again() -> None:
    config = tiny_config(n_kv_heads=4)
    method, plain = train.Repeating(config, menu=train.MENU), ElasticTraining(config, menu=train.MENU)
    for step in range(train.ELASTIC_STEPS):
        first, again = method.subnets(step), method.subnets(step + train.ELASTIC_STEPS)
        chex.assert_trees_all_equal(first, again)
        chex.assert_trees_all_equal(first, plain.subnets(step))


def test_a_model_is_refused():
    with pytest.raises(
        ValueError, match="--model x: bench train measures a model of its own; leave --model out"
    ):
        train.rows(Options(tiny=True, model="x"))

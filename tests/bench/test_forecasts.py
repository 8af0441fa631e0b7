"""Forecasts by hand, from times and evidence that are given."""

import dataclasses

import numpy as np
import pytest

from elastic_lm.bench.forecasts import Configuration, Evidence, Forecaster, one_exit
from elastic_lm.bench.parts import ExitParts, Parts, Shape
from elastic_lm.testing import tiny_config

PARTS = Parts(
    n_layers=4,
    full=10.0,
    previewed={"0.9": 9.0},
    ticks=None,
    verifying={1: 0.0, 2: 1.0, 3: 2.0, 4: 3.0},
    exit=ExitParts(layer=2, shallow=5.0, look=1.0, deep={1: 6.0, 2: 7.0, 3: 8.0, 4: 9.0}),
)
# Every second token leaves.
EVIDENCE = Evidence(
    confidence=np.asarray([[[0.9], [0.1], [0.9], [0.1]]]),
    agrees=np.ones((1, 4, 1), bool),
    sure={0.9: np.ones((1, 4, 2), bool)},
)
TEXT = [1], [2, 3, 4, 5]
SHAPE = Shape(batch=1, capacity=64, window=4)
AHEAD = Forecaster(tiny_config(), PARTS, SHAPE, [[TEXT]], EVIDENCE, {(2, 0.9): 0.5})


def test_exits() -> None:
    # Four looks after the lowest segment, and two deep ticks over two positions.
    found = AHEAD.exits(2, 0.9)
    assert found == Configuration("exits", 0.9, pytest.approx(40 / (4 * 6 + 2 * 7)), layer=2, share=0.5)
    assert str(found) == "exits after layer 2 at 90 %: 1.05x"


def test_previews() -> None:
    assert AHEAD.preview(0.9).speedup == pytest.approx(10 / 9)
    both = AHEAD.exits(2, 0.9, preview=True)
    assert both.speedup == pytest.approx(40 / (4 * 5 + 2 * 6))

    # A token of whose preview the exit is not sure goes deeper, and the model's own head is read in full.
    sure = EVIDENCE.sure[0.9].copy()
    sure[0, 0] = False
    unsure = dataclasses.replace(AHEAD, evidence=dataclasses.replace(EVIDENCE, sure={0.9: sure}))
    assert unsure.preview(0.9).speedup == pytest.approx(10 / 9.25)
    seconds = 4 * 5 + (6 + 6 + 7) - 3 * (1 - 0.25)
    assert unsure.exits(2, 0.9, preview=True).speedup == pytest.approx(40 / seconds)


def test_drafts() -> None:
    found = AHEAD.drafts(2, 0.9)
    assert found.speedup == pytest.approx(40 / (4 * 6 + 2 * 8))
    assert (found.accepted, found.share) == (1.0, 0.5)
    assert str(found) == "lossless exits after layer 2: 1.00x"

    wrong = dataclasses.replace(EVIDENCE, agrees=np.zeros((1, 4, 1), bool))
    rejected = dataclasses.replace(AHEAD, evidence=wrong).drafts(2, 0.9)
    assert rejected.accepted == 0.0
    assert rejected.speedup < found.speedup


def test_one_exit_keeps_the_arrays_of_the_others_out() -> None:
    config = tiny_config(exits=(1, 3))
    params = {"embed": 0, "exit_1": 1, "exit_3": 3}
    alone, kept = one_exit(config, params, 3)
    assert [e.layer for e in alone.exits] == [3]
    assert kept == {"embed": 0, "exit_3": 3}

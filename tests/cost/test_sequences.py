"""Counted FLOPs of sequences are the sums of counted FLOPs of decoding steps."""

import pytest

from elastic_lm.cost.counted import Workload, model_cost
from elastic_lm.cost.sequences import generation_flops, head_flops, layer_flops
from elastic_lm.testing import tiny_config


@pytest.mark.parametrize("windows", [(), (3, 0, 5, 100)])
def test_a_sequence_is_the_sum_of_its_steps(windows: tuple[int, ...]) -> None:
    config = tiny_config(windows=windows)
    steps = [model_cost(config, Workload(context=t)).flops for t in range(11)]
    assert layer_flops(config, 11) + head_flops(config, 11) == sum(steps)
    assert layer_flops(config, 11) == layer_flops(config, 11, 0, 3) + layer_flops(config, 11, 3)
    assert generation_flops(config, 8, 4) == sum(steps) - head_flops(config, 7)
    assert generation_flops(config, 8, 0) == 0

"""Forecasts by hand, their bytes against real parameters and their deep ticks against the decode loop's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig
from elastic_lm.data.batch import Batch
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.forecasting import (
    GATE_WIDTH,
    WeightBytes,
    forecast,
    forecast_outcome,
    positions_per_tick,
    weight_bytes,
)
from elastic_lm.depth.observations import observe
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.depth.threshold_search import ExitOutcome
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params
from elastic_lm.testing import random_tokens, tiny_config

WEIGHTS = WeightBytes(segments=(40, 50), modules=(0,), heads=(10,), gates=(1,), final_head=10)


def test_by_hand() -> None:
    assert WEIGHTS.full == 100
    # Half of the tokens exit: 1.5 positions per deep tick of at most two; heads 10 + 5.
    found = forecast(WEIGHTS, (0.5, 0.5), (0.7,), window=2)
    assert found.pending == pytest.approx((1.5,))
    assert found.segments == pytest.approx(0.4 + 0.5 / 1.5)
    assert found.heads == pytest.approx(0.15)
    assert found.speedup == pytest.approx(100 / (40 + 50 / 1.5 + 15))
    assert found.check == (0.1,)
    assert found.gated_check == (0.01,)
    # A further position at full cost: nothing is won by waiting.
    slow = forecast(WEIGHTS, (0.5, 0.5), (0.7,), window=2, further=1.0)
    assert slow.segments == pytest.approx(0.9)
    assert slow.verdict == "no gain expected"


def test_a_gate_reads_the_head_only_to_exit() -> None:
    found = forecast(WEIGHTS, (0.5, 0.5), (0.7,), looked=(0.6,), gated=True, window=2)
    assert found.heads == pytest.approx(0.01 + 0.06 + 0.05)
    with pytest.raises(ValueError, match=r"looked=\(0.6, 0.1\): give one share per exit"):
        forecast(WEIGHTS, (0.5, 0.5), (0.7,), looked=(0.6, 0.1))


def test_unused_exits_cost_nothing() -> None:
    found = forecast(WEIGHTS, (0.0, 1.0), (NEVER_EXITS,))
    assert found.speedup == pytest.approx(1.0)
    assert found.verdict == "no gain expected"
    looked_at = forecast(WEIGHTS, (0.0, 1.0), (1.0,))
    assert looked_at.speedup == pytest.approx(100 / 110)


def test_always_exiting_amortises_the_deep_layers_over_the_window() -> None:
    found = forecast(WEIGHTS, (1.0, 0.0), (0.0,), window=10)
    assert found.pending == pytest.approx((10.0,))
    assert found.speedup == pytest.approx(100 / (40 + 5 + 10))
    assert found.verdict == "about 1.82x expected"


def test_positions_per_tick() -> None:
    assert positions_per_tick(1.0, 16) == 1.0
    assert positions_per_tick(0.0, 16) == 16.0
    assert positions_per_tick(0.25, 3) == pytest.approx(1 + 0.75 + 0.75**2)
    rng = np.random.default_rng(0)
    pending, ticks, positions = 0, 0, 0
    for needed in rng.uniform(size=20_000) < 0.2:
        pending += 1
        if needed or pending == 4:
            ticks, positions, pending = ticks + 1, positions + pending, 0
    assert positions / ticks == pytest.approx(positions_per_tick(0.2, 4), rel=0.02)


@pytest.mark.long
def test_deep_ticks_are_those_of_the_decode_loop() -> None:
    config = tiny_config(exits=(1, 3))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(random.normal(0, 0.3, p.shape), p.dtype), init_params(config, jax.random.key(0))
    )
    tokens = random_tokens(config, 4, 64)
    positions = jnp.broadcast_to(jnp.arange(64), tokens.shape)
    batch = Batch(tokens, tokens, jnp.ones(tokens.shape), positions, jnp.ones_like(tokens))
    medians = np.median(observe(config, params, [batch], metric="max_prob").confidence, axis=0)
    policy = ConfidenceExit("max_prob", tuple(medians.tolist()), (1, 3))
    sampler = Sampler(Decoder(config), params, exit=policy, window=8)
    found = sampler.sample([1, 2, 3], 100, temperature=1.0, seed=1)
    depths = np.asarray(found.exit_layers[-100:])
    reach = [float(np.mean(depths > layer)) for layer in (1, 3)]
    assert 0.05 < reach[1] < reach[0] < 0.95
    ticks = found.stats.segment_ticks
    for needed, count in zip(reach, ticks[1:], strict=True):
        assert ticks[0] / count == pytest.approx(positions_per_tick(needed, 8), rel=0.1)


def test_bytes_are_those_of_the_parameters() -> None:
    exits = (ExitConfig(1, "mlp", gate=6), ExitConfig(2, "norm", tied=True), ExitConfig(4, "embedding"))
    config = tiny_config(param_dtype="bfloat16").with_exits(exits)
    params = init_params(config, jax.random.key(0))

    def size(*names: str) -> int:
        trees = [params]
        for name in names:
            trees = [tree[name] for tree in trees]
        return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))

    found = weight_bytes(config)
    assert found.segments == (
        size("layers_0"),
        size("layers_1"),
        size("layers_2") + size("layers_3"),
    )
    assert found.final_head == size("embed" if config.tied else "head")
    assert found.heads == (size("exit_1", "head"), found.final_head)
    assert found.modules == (size("exit_1", "mlp") + size("exit_1", "norm"), size("exit_2", "norm"))
    width = config.d_model
    assert found.gates == (size("exit_1", "gate"), 2 * (GATE_WIDTH * (width + 2) + 1))
    assert jnp.dtype(config.param_dtype).itemsize == 2


def test_an_exit_after_the_last_layer_counts_as_full_depth() -> None:
    config = tiny_config(exits=(2, 4))
    outcome = ExitOutcome(0.9, 3.0, (0.5, 0.3, 0.2))
    found = forecast_outcome(config, (0.5, 0.5), outcome)
    expected = forecast(weight_bytes(config), (0.5, 0.5), (0.5,))
    assert found == expected


def test_messages() -> None:
    with pytest.raises(ValueError, match="give 2 shares and 1 thresholds"):
        forecast(WEIGHTS, (1.0,), (0.5,))
    with pytest.raises(ValueError, match="window=0"):
        forecast(WEIGHTS, (0.5, 0.5), (0.5,), window=0)

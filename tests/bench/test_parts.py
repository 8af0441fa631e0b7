"""What is timed is what it is said to be, and what is made of it adds up."""

import collections

import jax
import numpy as np
import pytest

from elastic_lm.bench import parts
from elastic_lm.bench.parts import ExitParts, Parts, Shape
from elastic_lm.config.model import ExitConfig
from elastic_lm.decode.loop import tick_widths
from elastic_lm.decode.schedule import Iteration, Schedule
from elastic_lm.decode.tick_costs import TickCosts
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config

SHAPE = Shape(batch=2, capacity=64, window=4)
# Layers take 1 s over one position and 1.5 s over two; heads 2 s; an iteration 0.5 s beside.
MEASURED = Parts(
    n_layers=6,
    full=8.5,
    previewed={"p": 7.0},
    ticks=TickCosts((17.0, 25.0)),  # of another moment, in which everything took twice as long
    verifying={1: 0.0, 2: 0.5},
    exit=ExitParts(layer=4, shallow=4.5, look=2.0, deep={1: 4.0, 2: 5.0}),
)


def schedule(*iterations: tuple[Iteration, int]) -> Schedule:
    return Schedule(collections.Counter(dict(iterations)), tokens=1)


def test_layers_move_from_one_side_of_an_exit_to_the_other() -> None:
    assert MEASURED.layer(1) == pytest.approx(4.5 / 4)
    moved = MEASURED.at(2)
    assert moved.shallow == pytest.approx(4.5 - 2 * 4.5 / 4)
    assert moved.shallow + moved.deep[1] == pytest.approx(4.5 + 4.0)
    assert moved.deep[2] - moved.deep[1] == pytest.approx(4 * 0.5)
    assert MEASURED.at(4) == MEASURED.exit


def test_a_schedule_by_hand() -> None:
    leaving, deep = (Iteration(1, True, 0, False), 3), (Iteration(1, True, 2, True), 2)
    full_window = Iteration(1, True, 2, False), 1
    found = schedule(leaving, deep, full_window)
    # Heads are looked at six times, the model's own is read twice.
    assert MEASURED.seconds(found, layer=4) == pytest.approx(6 * 6.5 + 3 * 5.0 - 2.0)
    previewed = MEASURED.seconds(found, layer=4, preview="p", unsure=0.25)
    assert previewed == pytest.approx(6 * 5.0 + 3 * 5.0 - 2.0 + 2 * (0.25 * 2.0 - 1.5))
    verified = MEASURED.seconds(found, layer=4, lossless=True)
    assert verified == pytest.approx(6 * 6.5 + 3 * 5.5)

    plain = schedule((Iteration(1, False, 0, True), 4), (Iteration(2, False, 0, True), 1))
    assert MEASURED.seconds(plain, lookup=True, lossless=True) == pytest.approx(4 * 8.5 + 12.5)
    full = schedule((Iteration(1, False, 0, True), 4))
    assert MEASURED.seconds(full) == pytest.approx(4 * 8.5)
    assert MEASURED.seconds(full, preview="p", unsure=0.5) == pytest.approx(4 * (7.0 + 1.0))


@pytest.fixture(scope="module")
def program() -> parts._Program:
    config = tiny_config(n_layers=2).with_exits((ExitConfig(1, "norm", tied=True),))
    return parts._Program(config, init_params(config, jax.random.key(0)), SHAPE, 32)


def test_the_loop_does_what_it_is_forced_to(program: parts._Program) -> None:
    def ticks(controls, iterations):
        state = jax.tree.map(lambda x: x.copy(), program.begun)
        model = program.model
        state = model.run(model.config, model.params, state, controls, iterations, "exact")
        return state.ticks.tolist()

    assert ticks(program.forced(lambda i: True), SHAPE.window - 1) == [SHAPE.window - 1, 0]
    assert ticks(program.controls, 4) == [4, 4]
    for width in tick_widths(SHAPE.window):
        forced = program.forced(lambda i, width=width: i % width < width - 1)
        assert ticks(forced, 4 * width) == [4 * width, 4]


def test_times_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    shallow, look, deep, drift = 3.0, 1.0, {1: 4.0, 2: 5.0, 3: 6.0, 4: 8.0}, np.asarray([1.0, 1.5, 0.5])

    def fake(sides, rounds):
        seconds = {"full": 4 * 7.0, "leave": 3 * (shallow + look), "never": 4 * (shallow + deep[1])}
        for width, iterations in ((1, 4), (2, 4), (3, 3), (4, 4)):
            seconds[f"deep {width}"] = iterations * (shallow + look) + iterations / width * deep[width]
            seconds[f"head {width}"] = parts.HEAD_CALLS * (1.0 + 0.1 * width)
        assert set(sides) == set(seconds)
        return {name: value * drift for name, value in seconds.items()}

    monkeypatch.setattr(parts, "_in_turns", fake)
    config = tiny_config(n_layers=2)
    with_exit = config.with_exits((ExitConfig(1, "norm", tied=True),))
    params = init_params(with_exit, jax.random.key(0))
    found = parts.measure_parts(config, params, SHAPE, with_exit=(with_exit, params), lookup=False)
    assert found.full == pytest.approx(7.0)
    assert found.exit is not None
    assert (found.exit.layer, found.exit.shallow, found.exit.look) == pytest.approx((1, shallow, look))
    assert dict(found.exit.deep) == pytest.approx(deep)
    assert dict(found.verifying) == pytest.approx({1: 0.0, 2: 0.1, 3: 0.2, 4: 0.3})
    with pytest.raises(ValueError, match="window=1"):
        parts.measure_parts(config, params, Shape(1, 64, 1))

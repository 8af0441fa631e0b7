"""Where the wall time of a run goes: the division itself, injected delays, and runs that go on."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from training_runs import all_lines, changed

from elastic_lm.checkpoints.native import Checkpoints
from elastic_lm.train import Stopped, loop
from elastic_lm.train.config import RunConfig
from elastic_lm.train.goodput import FILE, SPENT, Goodput, attribute
from elastic_lm.train.run import fit


def test_steps_come_before_compilation_and_that_before_what_the_host_does() -> None:
    spans = [("data", 0.0, 2.0), ("data", 4.0, 7.0), ("checkpoint", 8.0, 9.0)]
    found = attribute(spans, [(1.0, 5.0), (4.5, 6.0)], [(0.5, 1.5), (7.5, 8.25)], 0.0, 10.0)
    assert found == {
        "productive": 5.0,  # 1 to 6
        "compile": 0.5 + 0.75,
        "data": 0.5 + 1.0,  # 0 to 0.5, 6 to 7
        "checkpoint": 0.75,
        "idle": 0.5 + 1.0,
    }
    assert sum(found.values()) == 10.0


def test_what_lies_outside_is_cut_off_and_nothing_is_idle_time() -> None:
    found = attribute([("data", -3.0, 1.0)], [(0.5, 9.0)], [(-1.0, 0.25)], 0.0, 2.0)
    assert found == {"productive": 1.5, "compile": 0.25, "data": 0.25, "idle": 0.0}
    assert attribute([], [], [], 3.0, 3.5) == {"productive": 0.0, "compile": 0.0, "idle": 0.5}


class Device:
    """A clock that only moves when it is told to, and steps that are done when it says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.goodput = Goodput(clock=lambda: self.now, wait=lambda done: done.wait(10.0))

    def send(self) -> threading.Event:
        done = threading.Event()
        self.goodput.step(lambda: (None, done))
        return done

    def finish(self, done: threading.Event) -> None:
        count = len(self.goodput._running._done)
        done.set()
        deadline = time.monotonic() + 10.0
        while len(self.goodput._running._done) == count and time.monotonic() < deadline:
            time.sleep(0.001)


def test_reading_a_batch_costs_nothing_while_a_step_runs() -> None:
    device = Device()
    device.now = 3.0
    device.goodput.ready(None, 0)
    first = device.send()
    with device.goodput.doing("data"):
        device.now = 5.0  # while the step runs
    device.finish(first)
    with device.goodput.doing("data"):
        device.now = 6.0  # while nothing does
    second = device.send()
    device.now = 10.0
    device.goodput.note(2)  # the second step still runs

    values = device.goodput.values()
    expected = {"start_seconds": 3.0, "productive_seconds": 2.0 + 4.0, "data_seconds": 1.0}
    assert {name: values[name] for name in expected} == expected
    assert values["wall_seconds"] == 10.0
    assert values["goodput"] == pytest.approx(0.6)

    device.now = 11.0
    device.finish(second)
    device.now = 13.0
    device.goodput.note(2)
    values = device.goodput.values()
    assert values["productive_seconds"] == 7.0
    assert values["idle_seconds"] == 2.0
    assert device.goodput.line() == (
        "goodput 53.8 % of 13.0 s: productive 7.0, start 3.0, data 1.0, idle 2.0"
    )
    device.goodput.close()


def test_steps_that_are_run_again_are_lost(tmp_path: Path) -> None:
    def seconds(until: int, *, start: int) -> dict[str, float]:
        device = Device()
        device.goodput.ready(tmp_path, start)
        for step in range(start + 1, until + 1):
            done = device.send()
            device.now += 2.0
            device.finish(done)
            if step % 5 == 0 or step == until:
                device.goodput.note(step)
        device.goodput.close()
        return device.goodput.values()

    assert seconds(12, start=0)["productive_seconds"] == 24.0
    after = seconds(20, start=10)  # the last checkpoint of the first start
    assert after["lost_seconds"] == 4.0
    assert after["productive_seconds"] == 40.0
    assert after["wall_seconds"] == 44.0
    again = seconds(20, start=0)  # all checkpoints are gone
    assert again["lost_seconds"] == 44.0
    assert again["goodput"] == pytest.approx(40 / 84)

    written = json.loads((tmp_path / FILE).read_text())
    assert written["starts"] == 3
    assert set(written["seconds"]) == set(SPENT)
    assert 0.0 <= written["between"] < 10.0


def test_a_damaged_file_is_named_and_the_run_goes_on(tmp_path: Path, caplog) -> None:
    (tmp_path / FILE).write_text('{"seconds": {"productive": "much"}, "marks": []}')
    goodput = Goodput()
    goodput.ready(tmp_path, 4)
    goodput.note(4)
    assert f"{tmp_path / FILE}: is damaged" in caplog.text
    assert goodput.values()["lost_seconds"] == 0.0
    goodput.close()


@pytest.fixture
def slow(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run that waits 0.2 s for each of 6 batches, and 0.3 s for each of 2 checkpoints."""
    original, save = loop.run, Checkpoints.save

    class Slow:
        def __init__(self, batches: Any) -> None:
            self._batches = batches

        def __next__(self) -> Any:
            time.sleep(0.2)
            return next(self._batches)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._batches, name)

    def run_slowly(*args: Any, batches: Any, **named: Any) -> Any:
        return original(*args, batches=Slow(batches), **named)

    def save_slowly(self: Checkpoints, *args: Any) -> None:
        time.sleep(0.3)
        save(self, *args)

    monkeypatch.setattr(loop, "run", run_slowly)
    monkeypatch.setattr(Checkpoints, "save", save_slowly)
    return changed(run_config, steps=6, save_every=3, log_every=1, eval_every=0)


def test_the_seconds_of_a_run_are_where_they_were_put_and_add_up(
    slow: RunConfig, tmp_path: Path, capsys
) -> None:
    began = time.monotonic()
    fit(slow, tmp_path)
    took = time.monotonic() - began

    *_, last = all_lines(tmp_path)
    assert last["step"] == 6
    seconds = {what: last[f"{what}_seconds"] for what in SPENT}
    assert sum(seconds.values()) == pytest.approx(last["wall_seconds"], rel=1e-4)
    assert 0.5 * took < last["wall_seconds"] <= took
    # Each step of this small model is over long before the next batch is there.
    assert 6 * 0.15 < seconds["data"] < 6 * 0.2 + 1.0
    assert seconds["checkpoint"] >= 2 * 0.3
    assert seconds["compile"] > 0.1
    assert seconds["evaluation"] > 0.0
    assert seconds["start"] > 0.0
    assert 0.0 < seconds["productive"] < took - 6 * 0.15 - 0.6
    assert seconds["lost"] == 0.0
    assert last["goodput"] == pytest.approx(seconds["productive"] / last["wall_seconds"], rel=1e-3)
    assert f"goodput {100 * last['goodput']:.1f} % of " in capsys.readouterr().out


@pytest.mark.long
def test_a_run_that_goes_on_adds_to_its_seconds(run_config: RunConfig, tmp_path: Path, capsys) -> None:
    config = changed(run_config, steps=6, save_every=100, eval_every=0)
    answers = iter([False, False, True])
    with pytest.raises(Stopped):
        fit(config, tmp_path, stop=lambda: next(answers))
    first = all_lines(tmp_path)[-1]
    assert first["step"] == 3
    fit(config, tmp_path)
    last = all_lines(tmp_path)[-1]
    assert last["step"] == 6
    assert last["wall_seconds"] > first["wall_seconds"]
    assert last["productive_seconds"] > first["productive_seconds"]
    assert last["lost_seconds"] == 0.0
    assert "; 2 starts, " in capsys.readouterr().out

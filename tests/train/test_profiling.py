"""Which steps are traced, and what lies in the folder then."""

import contextlib
import dataclasses
import gzip
import json
from pathlib import Path

import pytest
from training_runs import all_lines, changed

from elastic_lm.config.log import LogConfig
from elastic_lm.train import profiling
from elastic_lm.train.config import RunConfig
from elastic_lm.train.profiling import Profile, check_profile
from elastic_lm.train.run import fit


class Calls(list):
    """Notes when a trace begins and ends."""

    def start_trace(self, folder: Path, **_: object) -> None:
        self.append("start")

    def StepTraceAnnotation(self, *_: object, **__: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def stop_trace(self) -> None:
        self.append("stop")


def traced(profile: str, *, start: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps during which a trace runs."""
    calls = Calls()
    monkeypatch.setattr(profiling.jax, "profiler", calls)
    found, one = [], Profile(profile, Path("run"), start, steps)
    for step in range(start + 1, steps + 1):
        one.before(step)
        if len(calls) % 2:
            found.append(step)
        one.after(step, {})
    one.close()
    assert calls == ["start", "stop"] * bool(found)
    return found


@pytest.mark.parametrize(
    ("profile", "start", "steps", "expected"),
    [
        ("", 0, 9, []),
        ("4:6", 0, 9, [4, 5, 6]),
        ("4:6", 5, 9, [6]),  # goes on after a stop
        ("4:6", 6, 9, []),
        ("4:4", 0, 9, [4]),
        ("2", 0, 9, [3, 4]),  # the first steps compile
        ("2", 5, 20, [8, 9]),
        ("2", 0, 3, [2, 3]),
        ("3", 0, 3, [1, 2, 3]),
        ("3", 2, 3, [3]),
    ],
)
def test_steps_that_are_traced(
    profile: str, start: int, steps: int, expected: list[int], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert traced(profile, start=start, steps=steps, monkeypatch=monkeypatch) == expected
    said = capsys.readouterr().out
    assert ("were done before" in said) == (profile == "4:6" and start == 6)
    assert ("are traced; pip install xprof" in said) == bool(expected)


def test_what_is_no_step_is_refused() -> None:
    for wrong in ("0", "3:2", "a", "1:", ":3", "1-3", "-2", "0:3", " 3"):
        with pytest.raises(ValueError, match=f"log.profile='{wrong}': "):
            LogConfig(profile=wrong)
    check_profile("3:9", 9)
    for late in ("3:10", "10"):
        with pytest.raises(ValueError, match=rf"log.profile='{late}': the run has train.steps=9; name fewer"):
            check_profile(late, 9)


@pytest.mark.long
def test_a_run_leaves_a_trace_of_its_steps_and_says_how_to_look_at_it(
    run_config: RunConfig, tmp_path: Path, capsys
) -> None:
    config = changed(run_config, steps=5, eval_every=0)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, profile="3:4", peak_tflops=0.5))
    fit(config, tmp_path)
    assert f"steps 3 to 4 are traced; pip install xprof && xprof --logdir {tmp_path}/profile" in (
        capsys.readouterr().out
    )
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if "step_num" in event.get("args", {})}
    assert {int(step) for step in steps} == {3, 4}
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))

    for line in all_lines(tmp_path):
        if "loss" in line:
            assert 0 < line["mfu"] < 1

"""A run on a model of one's own ends in time, however fast the machine is."""

import itertools
import math
import time

import pytest

from elastic_lm.bench.plan import Forecasts, Plan
from elastic_lm.decode.results import Sample, SampleStatistics
from elastic_lm.quickstart import measure, pace
from elastic_lm.quickstart.budget import Budget
from elastic_lm.quickstart.options import Options
from elastic_lm.quickstart.pace import Pace
from elastic_lm.quickstart.settings import Setting


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Sampling:
    """A sampler that takes so many seconds per call, ten times as many the first time."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def sample(self, prompt: list[int], new_tokens: int, *, ignore_eos: bool) -> Sample:
        assert ignore_eos
        self.clock.now += self.seconds * (1 if self.calls else 10)
        self.calls += 1
        stats = SampleStatistics(new_tokens, len(prompt), 1.0, 1.0, 2.0, {2: new_tokens}, (new_tokens // 2,))
        return Sample("", prompt[:1] * new_tokens, [2] * new_tokens, stats)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_pass_stops_when_its_share_is_used_up(clock: Clock) -> None:
    budget = Budget(minutes=10)
    read = []
    for i in budget.within(itertools.count(), share=0.1, least=4):  # 60 s
        read.append(i)
        clock.now += 7
    assert len(read) == 9  # the ninth begins after 56 s
    read = []
    for i in budget.within(range(100), share=0.01, least=4):
        read.append(i)
        clock.now += 50
    assert read == [0, 1, 2, 3]  # as many as there have to be
    assert budget.left() == 600 - clock.now
    clock.now += 1000
    assert budget.left() == 0
    assert list(Budget().within(range(5), 0.01, 1)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("seconds", "prompts"), [(0.01, 8), (10.0, 8), (30.0, 6), (100.0, 1), (400.0, 1)])
def test_timing_ends_in_time(clock: Clock, seconds: float, prompts: int) -> None:
    samplers = {"full": Sampling(clock, seconds), "half": Sampling(clock, seconds / 2)}
    told = []
    found = measure.generate(
        samplers,  # pyright: ignore[reportArgumentType]
        [[i] for i in range(1, 9)],
        16,
        7,
        seconds=2000,
        tell=lambda what, done, total: told.append((what, done, total)),
    )
    # Compiling and the first turn are what cannot be left out.
    assert clock.now <= max(2000, 1.5 * seconds * 11)
    full, half = found["full"], found["half"]
    assert full.texts == [[i] * 16 for i in range(1, 1 + len(full.samples))]
    assert half.speedup(full) == pytest.approx(2)
    assert half.tokens_per_pass == 2
    assert len(full.samples) == prompts
    assert len(full.seconds) == {100.0: 3, 400.0: 1}.get(seconds, len(full.seconds))
    assert seconds >= 100 or len(full.seconds) >= measure.FEWEST_ROUNDS
    assert told[0][0] == "compiling full"
    assert {what for what, *_ in told} >= {"compiling half", "timing in turns"}


def test_a_machine_that_becomes_slower_is_noticed(clock: Clock) -> None:
    sampler = Sampling(clock, 1.0)

    def tell(what: str, done: float, total: float | None) -> None:
        if what == "timing in turns" and done == 5:
            sampler.seconds = 10.0

    prompts = [[1]] * 4
    found = measure.generate({"full": sampler}, prompts, 16, 7, seconds=60, tell=tell)  # pyright: ignore
    assert len(found["full"].seconds) < 7
    assert clock.now < 60 + 2 * 40  # one slow round at most is too much


@pytest.mark.parametrize(
    ("left", "turn", "expected"),
    [(math.inf, 5.0, (8, 7)), (1000, 1.0, (8, 7)), (39, 1.0, (8, 5)), (19, 1.0, (4, 5)), (1, 5.0, (1, 1))],
)
def test_prompts_are_given_up_before_rounds(left: float, turn: float, expected: tuple[int, int]) -> None:
    assert measure._fitting(8, 7, left, turn) == expected


@pytest.mark.parametrize("slower", [0.1, 1.0, 5.0, 20.0])
def test_sizes_fit_the_time_that_is_left(slower: float) -> None:
    speed = Pace(per_token=1e-3 * slower, per_step=0.03 * slower, compiling=5.0 * slower)
    options, tokens, prompts, new_tokens = pace.for_plan(Options(), speed, 600.0)
    assert 1 <= prompts <= 3
    assert 16 <= new_tokens <= 64
    least = pace.LEAST_BATCHES * options.batch_size * options.seq_len
    assert tokens * speed.per_token <= pace.PASS * 600 + 1
    assert least <= tokens or options.batch_size == 1

    row = Forecasts(target=0.95, preview=1.0, exit_layer=22, coverage=0.3, exits=1.2)
    plan = Plan(seconds=(0.03,) * 16, head=0.2, targets=(row,), lookup=1.0, accepted=0.0, previews={})
    sized = pace.for_tuning(options, speed, plan, exits=1, vocab=49_152, left=300.0)
    assert (sized is None) == (slower > 5)
    if sized is not None:
        tuned, fitted = sized
        assert 2 <= tuned.steps <= options.steps
        assert fitted * speed.per_token < pace.TUNING * 300

    # Twelve sides of a window of 16 iterations, and a round that is not timed, take an eighth of the time.
    rounds = pace.plan_rounds(speed, 16, 600.0)
    assert rounds == 1 or (1 + rounds) * 12 * 16 * speed.per_step <= pace.LOOKUP * 600
    assert (rounds == 5) == (slower < 2)

    held_out = pace.for_held_out(options, speed, 200.0)
    assert pace.LEAST_TOKENS <= held_out.test_tokens <= options.test_tokens

    settings = [Setting("exits", 0.9, 0.9), Setting("lookup", 1.0, 1.0), Setting("exits", 0.98, 0.98)]
    some = pace.compared(settings, speed, 150.0)
    assert some == {0.1: settings, 1.0: settings, 5.0: settings[1:2], 20.0: settings[1:2]}[slower]
    assert pace.compared(settings, Pace(1.0, 1.0, 15.0), 150.0) == settings
    assert pace.compared(settings, Pace(1.0, 1.0, 20.0), 150.0) == settings[1:]

    timed, seconds = pace.for_timing(options, speed, 6, 150.0)
    assert 1 <= timed.prompts <= 8
    assert 16 <= timed.new_tokens <= 256
    assert 0.7 * 150 <= seconds <= 150

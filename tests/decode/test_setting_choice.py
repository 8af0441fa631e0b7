"""The choice of a setting for a budget of milliseconds and quality, and its words."""

import re

import pytest

import elastic_lm as el

FULL = el.Setting("full depth", 8.0, lossless=True, measured=True)
LOOKUP = el.Setting("lossless lookup", 7.0, lossless=True, dials={"lossless": True, "lookup": True})
EXITS = el.Setting("exits", 5.0, agreement=0.95)
HALF = el.Setting("half", 4.0, agreement=0.9, added_loss=0.04, measured=True)
QUARTER = el.Setting("quarter", 3.0, added_loss=0.3, measured=True)
ALL = [FULL, LOOKUP, EXITS, HALF, QUARTER]


@pytest.mark.parametrize(
    ("budget", "chosen", "words"),
    [
        (
            {"latency_ms": 9.0},
            LOOKUP,
            "asked for 9 ms: lossless lookup: 7 ms a token .forecast., every token",
        ),
        ({"latency_ms": 6}, EXITS, "the next better, lossless lookup: 7 ms .*, takes longer than is allowed"),
        ({"latency_ms": "50%"}, HALF, r"asked for 4 ms: half: 4 ms a token \(measured\), 90.0% of tokens"),
        ({"quality": 1.0}, LOOKUP, "of the faster ones the best, exits.*, is not good enough; 1.14 times"),
        (
            {"quality": 0.93},
            EXITS,
            "asked for 93.0% of tokens the whole model's: exits.*; 1.60 times as fast",
        ),
        ({"quality": "+0.05"}, HALF, r"a loss of at most \+0.05 nats: half.* and a loss \+0.040 nats"),
        ({"quality": "+1"}, QUARTER, "quarter: 3 ms"),
        ({"latency_ms": 7.5, "quality": 0.99}, LOOKUP, "asked for 7.5 ms and 99.0% of tokens"),
        ({"latency_ms": 4, "quality": 0.5}, HALF, "half"),
    ],
)
def test_what_is_chosen_and_why(budget, chosen, words):
    for settings in (ALL, ALL[::-1]):
        choice = el.choose(settings, el.Budget(**budget))
        assert choice.setting is chosen
        assert re.search(words, choice.reason)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"latency_ms": 2}, r"budget 2 ms: nothing meets it; the fastest of that quality is quarter: 3 ms"),
        (
            {"latency_ms": 4, "quality": 0.99},
            r"nothing meets it; the fastest of that quality is lossless lookup.*; the best of that speed is",
        ),
        ({"parameters": 5.0}, r"budget.parameters=5.0: settings are compared by latency_ms and quality"),
    ],
)
def test_what_nothing_meets_names_what_comes_nearest(budget, message):
    with pytest.raises(ValueError, match=message):
        el.choose(ALL, el.Budget(**budget))


def test_shares_need_full_depth():
    with pytest.raises(ValueError, match=r"budget.latency_ms='50%': is a share of full depth, which is not"):
        el.choose([EXITS], el.Budget(latency_ms="50%"))
    with pytest.raises(ValueError, match=r"settings=\[\]: are empty"):
        el.choose([], el.Budget(quality=1.0))


@pytest.mark.parametrize("quality", [0, 1.5, "0.1", "+x", "+-1", "+nan", "+inf", "", True])
def test_a_quality_that_is_none_is_refused(quality):
    with pytest.raises(ValueError, match=r"budget\.quality"):
        el.Budget(quality=quality)


def test_a_budget_of_old_is_what_it_was():
    budget = el.Budget(parameters="70%", quality=0.9)
    assert (budget.kind, budget.share, budget.agreement) == ("parameters", 0.7, 0.9)
    assert budget.of(10.0) == el.Budget(parameters=7.0, quality=0.9)
    assert el.Budget(quality="+0.1").kind == "quality"
    with pytest.raises(ValueError, match="set exactly one of latency_ms, parameters, flops, memory_bytes"):
        el.Budget()
    with pytest.raises(ValueError, match="set exactly one of"):
        el.Budget(latency_ms=1, flops=2, quality=0.5)
    config = el.testing.tiny_config()
    chooser = el.SubnetChooser(config, el.Menu(mlp=(0.5, 1.0)))
    with pytest.raises(ValueError, match=r"budget.quality=0.9: a menu says what sub-networks cost"):
        chooser.subnet(budget)


def test_a_lossless_setting_that_is_slower_is_not_full_depth():
    slow = el.Setting("drafter", 16.0, lossless=True, dials={"lossless": True})
    choice = el.choose([FULL, slow, HALF], el.Budget(latency_ms="50%"))
    assert choice.setting is HALF
    assert choice.reason.startswith("asked for 4 ms")
    assert (
        el.choose([slow, FULL], el.Budget(quality=1.0)).reason
        == f"asked for 100.0% of tokens the whole model's: {FULL}"
    )


def test_an_agreement_that_was_measured_is_no_promise():
    lucky = el.Setting("half", 4.0, agreement=1.0, measured=True)
    assert "100.0% of tokens" in str(lucky)
    assert "every token" not in str(lucky)


@pytest.mark.parametrize(
    "fields",
    [
        {"added_loss": float("nan")},
        {"agreement": 1.5},
        {"lossless": True, "agreement": 0.9},
        {"latency_ms": float("nan")},
    ],
)
def test_numbers_that_cannot_be_are_refused(fields):
    with pytest.raises(ValueError, match=r"setting\.\w+="):
        el.Setting(**{"name": "one", "latency_ms": 1.0, **fields})

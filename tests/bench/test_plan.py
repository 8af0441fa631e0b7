"""What a plan chooses and says."""

import dataclasses
import io

import pytest
from rich.console import Console

from elastic_lm.bench import plan as planning
from elastic_lm.bench.forecasts import Configuration
from elastic_lm.bench.plan import Forecasts, Plan
from elastic_lm.depth.previewing import PreviewReport

REPORT = PreviewReport(
    rank=8, blocks=4, margin=1.0, agreement=0.95, whole=0.1, bytes=0.4, variation=0.1, tokens=64
)
POOR = (
    Configuration("preview", 0.95, 0.98),
    Configuration("exits", 0.95, 0.9, layer=2, share=0.3),
    Configuration("exits + preview", 0.95, 0.91, layer=2, share=0.3),
    Configuration("lossless lookup", None, 1.01, accepted=0.4),
    Configuration("lossless exits", 0.95, 0.8, layer=2, accepted=0.2),
)
NOTHING = Plan(
    seconds=(0.002, 0.003),
    head=0.2,
    targets=(Forecasts(0.95, preview=0.98, exit_layer=2, coverage=0.3, exits=0.9, both=0.91),),
    lookup=1.01,
    accepted=0.4,
    previews={0.95: REPORT},
    configurations=POOR,
    full=0.0019,
    dtype="float32",
)


def shown(plan: Plan) -> str:
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    planning.show_plan(plan, console)
    return console.export_text()


def test_nothing_pays() -> None:
    assert NOTHING.chosen == ()
    assert NOTHING.paying_exits == ()
    assert NOTHING.verdict.startswith("nothing pays on this model and device, because the head is 20%")
    assert "30% of the tokens" in NOTHING.verdict
    assert NOTHING.verdict.endswith("the best of all is lossless lookup: 1.01x")
    text = shown(NOTHING)
    assert "1.9 ms (float32, batch 1)" in text
    assert "0.90x (30%)" in text
    assert NOTHING.verdict in text


def test_exits_are_worth_tuning_where_they_may_win() -> None:
    rows = (
        Forecasts(0.9, preview=0.98, exit_layer=5, coverage=0.7, exits=1.3),
        Forecasts(0.95, preview=0.98, exit_layer=3, coverage=0.5, exits=1.2),
        Forecasts(0.99, preview=1.25, exit_layer=4, coverage=0.3, exits=1.2),
    )
    plan = dataclasses.replace(NOTHING, targets=rows)
    assert plan.paying_exits == (3, 5)
    assert dataclasses.replace(plan, lookup=1.5).paying_exits == (5,)
    assert dataclasses.replace(plan, lookup=1.7).paying_exits == ()


def test_the_fastest_of_each_kind_is_chosen() -> None:
    better = (
        Configuration("exits + preview", 0.95, 1.3, layer=2, share=0.5),
        Configuration("exits", 0.95, 1.2, layer=2, share=0.6),
        Configuration("lossless lookup", None, 1.6, accepted=2.0),
        Configuration("lossless lookup + exits", 0.95, 1.5, layer=2, accepted=2.0),
    )
    plan = dataclasses.replace(NOTHING, configurations=better)
    assert plan.chosen == (better[2], better[0])
    assert plan.verdict == "lossless lookup: 1.60x; exits + preview after layer 2 at 95 %: 1.30x"
    saved = planning.to_json(plan)
    assert saved["chosen"][0]["name"] == "lossless lookup"
    assert len(saved["configurations"]) == 4


@pytest.mark.parametrize(("layers", "expected"), [(2, (1,)), (30, (12, 16, 20, 22, 25))])
def test_candidates_lie_below_the_last_layer(layers: int, expected: tuple[int, ...]) -> None:
    assert planning.candidate_layers(layers) == expected

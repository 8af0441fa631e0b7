"""Options of the commands: one home for every default, flags for every field, and refusals that help."""

import argparse
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from elastic_lm.bench import latency_build, latency_verify, report
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.endpoint import Endpoint
from elastic_lm.cascade.guarantee import CascadeRisk
from elastic_lm.cascade.measure import measure_cascade
from elastic_lm.cascade.multiple_choice import MultipleChoice
from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.cascade.scores import KINDS, Scoring
from elastic_lm.cascade.text_answerer import TextAnswerer
from elastic_lm.cli import (
    bench,
    calibrate,
    chat,
    convert,
    evaluate,
    export,
    generate,
    latency,
    plan,
    push,
    quickstart,
    subnets,
    train,
)
from elastic_lm.cli.cascade import fit, run
from elastic_lm.cli.main import COMMANDS, build_parsers
from elastic_lm.cli.parser import CommandOptions, Parser
from elastic_lm.config.cascade import DEFAULT_SCORE, SOURCE_TOKENS, Centre
from elastic_lm.config.exit_policy import STRATEGIES, Strategy
from elastic_lm.config.guarantee import DEFAULT_EPSILON
from elastic_lm.config.subnet import BUDGET_KINDS, Budget
from elastic_lm.cost.counted import Workload
from elastic_lm.decode.options import DecodeOptions
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.settings import Settings
from elastic_lm.depth import calibration, confidence, forecasting
from elastic_lm.depth.observations import observe
from elastic_lm.quickstart.options import Options as QuickstartJob

LEAVES: tuple[ModuleType, ...] = (
    quickstart,
    plan,
    convert,
    export,
    push,
    train,
    calibrate,
    latency,
    subnets,
    generate,
    chat,
    evaluate,
    fit,
    run,
    bench,
)
REQUIRED: dict[ModuleType, dict[str, Any]] = {
    convert: {"source": "a", "target": "b"},
    export: {"source": "a", "target": "b"},
    push: {"model": "a", "to": "b/c"},
    train: {"config": "c.py", "workdir": "w"},
    latency: {"action": "build"},
    bench: {"name": "decode"},
    fit: {"swift": "a", "super_": "b", "data": "d.jsonl", "super_accuracy": True},
    run: {"swift": "a", "super_": "b", "data": "d.jsonl", "threshold": 0.0, "out": "o.jsonl"},
}


def made(module: ModuleType, **fields: Any) -> CommandOptions:
    return module.Options(**{**REQUIRED.get(module, {}), **fields})


def parsers() -> dict[ModuleType, Parser]:
    """The parser of every command that runs."""
    _, commands = build_parsers()
    actions = next(a for a in commands["cascade"]._actions if isinstance(a, argparse._SubParsersAction))
    named = {**commands, **{f"cascade.{name}": parser for name, parser in actions.choices.items()}}
    return {module: named[module.__name__.removeprefix("elastic_lm.cli.")] for module in LEAVES}


def default(function: Any, name: str) -> Any:
    """Of an argument of a function or class, or of a field of a dataclass."""
    return inspect.signature(function).parameters[name].default


@pytest.mark.parametrize(
    ("module", "field", "library"),
    [
        (calibrate, "metric", default(calibration.calibrate, "metric")),
        (calibrate, "metric", default(observe, "metric")),
        (calibrate, "metric", QuickstartJob.metric),
        (calibrate, "metric", confidence.DEFAULT_METRIC),
        (calibrate, "target", default(calibration.calibrate, "target")),
        (calibrate, "target", default(calibration.fit_thresholds, "target")),
        (calibrate, "strategy", default(calibration.calibrate, "strategy")),
        (calibrate, "tokens", QuickstartJob.calibration_tokens),
        (evaluate, "tokens", QuickstartJob.test_tokens),
        (calibrate, "window", default(forecasting.forecast_outcome, "window")),
        (generate, "window", DecodeOptions.window),
        (generate, "missing", DecodeOptions.missing),
        (generate, "lossless", DecodeOptions.lossless),
        (generate, "draft", DecodeOptions.draft),
        (generate, "max_new_tokens", default(Sampler.sample, "max_new_tokens")),
        (generate, "max_new_tokens", default(Sampler.stream, "max_new_tokens")),
        (bench, "tiny", report.Options.tiny),
        (bench, "rounds", report.Options.rounds),
        (bench, "seed", report.Options.seed),
        (bench, "model", report.Options.model),
        (latency, "rounds", default(latency_build.build, "rounds")),
        (latency, "rounds", default(latency_verify.verify, "rounds")),
        (latency, "seed", default(latency_build.build, "seed")),
        (fit, "normalise", default(MultipleChoice, "normalise")),
        (fit, "batch_size", default(Cascade, "batch_size")),
        (fit, "batch_size", default(MultipleChoice, "batch_size")),
        (fit, "batch_size", default(measure_cascade, "batch_size")),
        (fit, "max_new_tokens", default(TextAnswerer, "max_new_tokens")),
        (fit, "timeout", default(Endpoint, "timeout")),
        (fit, "retries", default(Endpoint, "retries")),
        (fit, "style", default(Endpoint, "style")),
        (fit, "super_cost", default(Endpoint, "cost")),
        (fit, "seed", CascadeRule.seed),
        (fit, "cost", default(measure_cascade, "cost")),
    ],
)
def test_flags_and_the_library_have_the_same_defaults(module: ModuleType, field: str, library: Any) -> None:
    assert getattr(made(module), field) == library


def test_what_is_not_given_is_left_to_the_library() -> None:
    assert made(generate).given(generate.SETTINGS) == {"stop": Settings.stop}
    assert (Workload.context, Workload.batch) == (0, 1)
    assert Scoring().centre == get_args(Centre)[0]
    assert CascadeRisk(0.1).epsilon == DEFAULT_EPSILON
    assert CascadeRule(0.0).score == DEFAULT_SCORE == KINDS[0]
    assert default(TextAnswerer, "max_len") == SOURCE_TOKENS


@pytest.mark.parametrize(
    ("module", "library", "field"),
    [
        *((generate, Settings, field) for field in generate.SETTINGS if field != "stop"),
        (generate, DecodeOptions, "fire_share"),
        (fit, Scoring, "temperature"),
    ],
)
def test_help_shows_the_defaults_that_are_left_to_the_library(
    module: ModuleType, library: type, field: str
) -> None:
    assert getattr(made(module), field) is None
    assert help_of(module, field).endswith(f"(default: {getattr(library, field):g})")


def test_names_come_from_their_definitions() -> None:
    assert tuple(f.name for f in dataclasses.fields(Budget)) == (*BUDGET_KINDS, "quality")
    assert set(STRATEGIES) - {"joint"} == set(get_args(Strategy))
    for name in confidence.METRICS:
        assert name in help_of(calibrate, "metric")
    assert "learned" not in help_of(quickstart, "metric")
    for name in report.names():
        assert name in help_of(bench, "name")


def test_the_documents_name_every_benchmark() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    section = text.partition("\n## bench\n")[2].partition("\n## ")[0]
    assert section.strip()
    assert [name for name in report.names() if f"`{name}`" not in section] == []


def help_of(module: ModuleType, field: str) -> str:
    return next(a.help or "" for a in parsers()[module]._actions if a.dest == field)


@pytest.mark.parametrize("module", LEAVES, ids=lambda m: m.__name__)
def test_every_field_has_a_flag_and_every_flag_a_field(module: ModuleType) -> None:
    flags = {a.dest for a in parsers()[module]._actions} - {"help", "debug"}
    fields = {f.name for f in dataclasses.fields(module.Options)}
    if module is quickstart:
        assert flags <= fields | {f.name for f in dataclasses.fields(QuickstartJob)}
    else:
        assert flags == fields - {"overrides"}  # which `main` fills with what no flag takes


@pytest.mark.parametrize("module", LEAVES, ids=lambda m: m.__name__)
def test_help_shows_the_defaults_of_the_fields(module: ModuleType) -> None:
    options = QuickstartJob() if module is quickstart else made(module)
    for action in parsers()[module]._actions:
        assert action.dest == "help" or action.default is argparse.SUPPRESS
        shown = re.search(r"\(default: (\S*)\)|^default: (\S*)$", action.help or "")
        value = getattr(options, action.dest, None)
        if not shown or value is None or action.dest == "color":
            continue
        written = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
        assert (shown[1] or shown[2]) == (f"{written:g}" if isinstance(written, float) else str(written))


def test_commands_are_modules_with_the_same_parts() -> None:
    for name in COMMANDS:
        module = importlib.import_module(f"elastic_lm.cli.{name}")
        assert module.HELP.splitlines()[0].endswith(".")
        assert callable(module.add_flags)
    for module in LEAVES:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made(module), dataclasses.fields(module.Options)[0].name, 1)
        assert callable(module.run)


def test_only_from_flags_sees_a_namespace() -> None:
    for module in LEAVES:
        takes = [
            name
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if any("Namespace" in str(p.annotation) for p in inspect.signature(function).parameters.values())
        ]
        assert takes == []


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        (quickstart, {"color": "red"}, "--color='red': must be one of auto, always, never"),
        (convert, {"dtype": "int8"}, "--dtype='int8': must be one of float32, bfloat16, float16"),
        (export, {"dtype": "int8"}, "--dtype='int8': must be one of float32, bfloat16, float16"),
        (calibrate, {"target": 0.0}, "--target 0.0: must be a share above 0 and at most 1"),
        (calibrate, {"epsilon": 1.5}, "--epsilon 1.5: must be a share"),
        (calibrate, {"delta": 0.1}, "--delta 0.1: is part of a guarantee; give --epsilon too"),
        (calibrate, {"metric": "mood"}, "metric='mood': must be one of max_prob, margin"),
        (calibrate, {"strategy": "hope"}, "strategy='hope': must be one of joint, max_coverage"),
        (calibrate, {"window": 0}, "--window 0: must be at least 1"),
        (calibrate, {"tokens": 0}, "--tokens 0: must be at least 1"),
        (evaluate, {"seq_len": 0}, "--seq-len 0: must be at least 1"),
        (evaluate, {"data": ("a.txt", "b.jsonl")}, "--data a.txt b.jsonl: give text files or JSON lines"),
        (plan, {"minutes": 0.0}, "--minutes 0.0: must be above 0"),
        (plan, {"batch_size": 0}, "--batch-size 0: must be at least 1"),
        (plan, {"window": 1}, "--window 1: must be at least 2"),
        (plan, {"targets": (1.0,)}, "--targets 1.0: must be below 1"),
        (plan, {"dtype": "int8"}, "--dtype='int8': must be one of float32, bfloat16, float16"),
        (generate, {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        (generate, {"dtype": "int8"}, "--dtype='int8': must be one of float32, bfloat16, float16"),
        (calibrate, {"dtype": "int8"}, "--dtype='int8': must be one of float32, bfloat16, float16"),
        (evaluate, {"dtype": "int8"}, "--dtype='int8': must be one of float32, bfloat16, float16"),
        (generate, {"window": 0}, "--window 0: must be at least 1"),
        (generate, {"missing": "guess"}, "--missing='guess': must be one of exact, propagate"),
        (generate, {"draft": 3}, "--draft 3: drafts are verified with --lossless only; add it"),
        (generate, {"thresholds": "t", "threshold": 0.5}, "--thresholds t and --threshold 0.5: give one"),
        (generate, {"budget_context": 8}, "--budget-context 8: is read for --budget flops=N or memory"),
        (latency, {"action": "guess"}, "action='guess': must be one of build, verify"),
        (latency, {"json": "x.json"}, "--json x.json: goes with `latency verify`; leave it out"),
        (latency, {"rounds": 0}, "--rounds 0: must be at least 1"),
        (bench, {"rounds": 0}, "--rounds 0: must be at least 1"),
        (fit, {"swift": None}, "--swift: name the small model, or --swift-exit of the Super"),
        (fit, {"swift_exit": 2}, "--swift-exit 2: is an exit of the Super; leave --swift out"),
        (fit, {"batch_size": 0}, "--batch-size=0: must be at least 1"),
        (fit, {"normalise": "words"}, "--normalise='words': must be one of tokens, bytes, none"),
        (fit, {"style": "soap"}, "--style='soap': must be one of rows, openai"),
        (fit, {"centre": "median"}, "--centre='median': must be one of none, mean"),
        (fit, {"cost": "tears"}, "--cost='tears': must be one of flops, seconds"),
        (
            fit,
            {"risk": 0.1},
            "goals={'risk': 0.1, 'super_accuracy': True}: set exactly one of target_accuracy",
        ),
        (fit, {"epsilon": 0.1}, "--epsilon 0.1: is part of a guarantee; give --risk too"),
        (fit, {"tolerance": -1.0}, "--tolerance=-1.0: must be at least 0 and finite"),
        (run, {"rule": "r.json"}, "--rule r.json, --threshold 0.0: give one of them"),
        (run, {"rule": "r.json", "threshold": None, "centre": "mean"}, "--centre mean: is settled by --rule"),
    ],
)
def test_options_name_field_value_and_fix(module: ModuleType, fields: dict[str, Any], message: str) -> None:
    made(module)
    with pytest.raises(ValueError, match=re.escape(message)):
        made(module, **fields)

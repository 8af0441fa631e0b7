"""Descriptions that contradict themselves, and shares typed on the command line."""

import dataclasses

import pytest

from elastic_lm.cli import parser as flags
from elastic_lm.config.model import ExitConfig
from elastic_lm.testing import tiny_config
from elastic_lm.train.config import WITHOUT_EXITS, MethodName, RunConfig, TrainConfig


@pytest.mark.parametrize("method", ["ee_tuning", "joint"])
def test_gates_that_no_method_trains_are_refused(method: MethodName) -> None:
    gated = (ExitConfig(1, "norm"), ExitConfig(2, "norm", gate=4))
    message = (
        rf"exit_2\.gate=4: train\.method='{method}' trains no gates: choose self_supervised_exits, or set 0"
    )
    with pytest.raises(ValueError, match=message):
        RunConfig(tiny_config(n_layers=3), gated, train=TrainConfig(method=method))
    with pytest.raises(ValueError, match=message):
        RunConfig(tiny_config(n_layers=3).with_exits(gated), train=TrainConfig(method=method))
    RunConfig(tiny_config(n_layers=3), gated, train=TrainConfig(method="self_supervised_exits"))


@pytest.mark.parametrize("method", sorted(set(WITHOUT_EXITS) - {"routers"}))  # those begin with a model
def test_exits_that_no_method_trains_are_refused(method: MethodName) -> None:
    model, exits, train = tiny_config(n_layers=3), (ExitConfig(1, "norm"),), TrainConfig(method=method)
    message = rf"train\.method='{method}': trains no exits: choose ee_tuning, .*, or leave %s out$"
    with pytest.raises(ValueError, match=message % "exits"):
        RunConfig(model, exits, train=train)
    with pytest.raises(ValueError, match=message % r"model\.exits"):
        RunConfig(model.with_exits(exits), train=train)
    RunConfig(model, train=train)
    RunConfig(model.with_exits(exits), train=dataclasses.replace(train, init_from="model"))  # which decides


@pytest.mark.parametrize(("text", "wrong"), [("abc", "'abc'"), ("0", "0"), ("nan", "nan"), ("0.9,x", "'x'")])
def test_what_is_no_share_is_named(capsys: pytest.CaptureFixture[str], text: str, wrong: str) -> None:
    _, commands = flags.build_parsers()
    with pytest.raises(SystemExit):
        commands["quickstart"].parse_args(["--targets", text])
    assert f"argument --targets: {wrong} is not a share" in capsys.readouterr().err

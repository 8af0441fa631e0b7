"""Descriptions that contradict themselves, and shares typed on the command line."""

import pytest

from elastic_lm.cli.main import build_parsers
from elastic_lm.config.model import ExitConfig
from elastic_lm.testing import tiny_config
from elastic_lm.train.config import RunConfig, TrainConfig
from elastic_lm.train.registry import method_class


@pytest.mark.parametrize("method", ["ee_tuning", "joint"])
def test_gates_that_no_method_trains_are_refused(method: str) -> None:
    gated = (ExitConfig(1, "norm"), ExitConfig(2, "norm", gate=4))
    message = (
        rf"exit_2\.gate=4: method\.name='{method}' trains no gates: choose self_supervised_exits, or set 0"
    )
    with pytest.raises(ValueError, match=message):
        RunConfig(tiny_config(n_layers=3), gated, method=method_class(method).section())
    with pytest.raises(ValueError, match=message):
        RunConfig(tiny_config(n_layers=3).with_exits(gated), method=method_class(method).section())
    RunConfig(tiny_config(n_layers=3), gated, method=method_class("self_supervised_exits").section())


@pytest.mark.parametrize(
    "method", ["pretraining", "sorted_finetuning", "flextron"]
)  # those begin with a model
def test_exits_that_no_method_trains_are_refused(method: str) -> None:
    model, exits = tiny_config(n_layers=3), (ExitConfig(1, "norm"),)
    section = method_class(method).section()
    message = rf"method\.name='{method}': trains no exits: choose ee_tuning, .*, or leave %s out$"
    with pytest.raises(ValueError, match=message % "exits"):
        RunConfig(model, exits, method=section)
    with pytest.raises(ValueError, match=message % r"model\.exits"):
        RunConfig(model.with_exits(exits), method=section)
    RunConfig(model, method=section)
    RunConfig(model.with_exits(exits), method=section, train=TrainConfig(init_from="model"))  # which decides


@pytest.mark.parametrize(("text", "wrong"), [("abc", "'abc'"), ("0", "0"), ("nan", "nan"), ("0.9,x", "'x'")])
def test_what_is_no_share_is_named(capsys: pytest.CaptureFixture[str], text: str, wrong: str) -> None:
    _, commands = build_parsers()
    with pytest.raises(SystemExit):
        commands["quickstart"].parse_args(["--targets", text])
    assert f"argument --targets: {wrong} is not a share" in capsys.readouterr().err

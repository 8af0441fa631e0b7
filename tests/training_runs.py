"""Training runs of seconds: how tests change them, stop them and read what they wrote."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.train import text
from elastic_lm.train.config import TrainConfig
from elastic_lm.train.registry import method_class


def changed(config: Any, method: str = "", **options: Any) -> Any:
    """`config` with other fields of `train` and `method`; `method` names another method."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    train = {name: value for name, value in options.items() if name in names}
    own = {name: value for name, value in options.items() if name not in names}
    section = method_class(method).section(**own) if method else dataclasses.replace(config.method, **own)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train), method=section)


class Stopped(Exception):
    """What `stop_at` raises."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, module: Any = text) -> None:
    """Makes a run that `module` prepares die just before it places its batch number `step` on the devices."""
    calls = iter(range(1, 10**6))

    def dying(place: Any, *args: Any, **named: Any) -> Any:
        if next(calls) == step:
            raise Stopped
        return place(*args, **named)

    monkeypatch.setattr(module, "place_batch", functools.partial(dying, module.place_batch))


def metric_lines(workdir: Path) -> list[dict]:
    """Lines of metrics, without those that divide the time of a start."""
    return [line for line in all_lines(workdir) if "goodput" not in line]


def all_lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]

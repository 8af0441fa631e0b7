"""Configs of elastic_lm 0.1, where `train` held the method's name and the options of all methods.

They are read for one release, with a warning; run.json files of that form are read without one, so that a run
that 0.1 began can be resumed.
"""

import copy
import warnings
from typing import Any

from elastic_lm.config.checks import require

_TASK = ("teacher_from", "distil", "temperature", "z_loss", "tuned", "exit_weights")
_ROUTERS = ("budgets", "priced", "latency_table", "context", "scheme", "reads", "router_width", "router_lr")
_ROUTERS += ("budget_weight", "train_model", "distil", "surrogate_error")
_SORTED = ("depths", "depth_weights", "depth_scale", "curriculum", "curriculum_period", "layer_dropout")
_SORTED += ("dropout_ramp",)
_EXITS = {
    "exit_weights": "weights",
    "exit_warmup": "warmup_steps",
    "confidence_weighted": "dynamic_token_weights",
}
_SELF_SUPERVISED = {"imitation": "alpha"}
_SELF_SUPERVISED |= {name: name for name in ("objective", "top_k", "cached_batches", "balance_gates")}
_ELASTIC = {f"menu_{axis}": f"menu.{axis}" for axis in ("mlp", "heads", "groups", "dropped")}
_ELASTIC |= {
    name: name
    for name in ("draw", "samples", "smallest_share", "distil", "teacher", "elastic_groups", "rank_batches")
}

# Options of methods with the defaults that 0.1 had.
OPTIONS: dict[str, Any] = {
    **{"exit_weights": (), "exit_warmup": 0, "confidence_weighted": False},
    **{"depths": (), "depth_weights": "uniform", "depth_scale": 1.0, "curriculum": "all"},
    **{"curriculum_period": 0, "layer_dropout": 0.0, "dropout_ramp": 0},
    **{"objective": "kl", "top_k": 0, "imitation": 0.9, "cached_batches": 0, "balance_gates": True},
    **{"menu_mlp": (0.25, 0.5, 0.75, 1.0), "menu_heads": (1.0,), "menu_groups": (1.0,), "menu_dropped": ()},
    **{"draw": "per_layer", "samples": 2, "smallest_share": 0.5, "distil": 0.0, "teacher": "live"},
    **{"elastic_groups": 0, "rank_batches": 16, "budgets": (0.5, 0.625, 0.75, 0.875, 1.0)},
    **{"priced": "parameters", "latency_table": "", "context": 0, "scheme": "end_to_end", "reads": "budget"},
    **{"router_width": 256, "router_lr": 1.0, "budget_weight": 10.0, "train_model": False},
    **{"surrogate_error": 0.5, "teacher_from": "", "temperature": 1.0, "z_loss": 0.0, "tuned": "all"},
}

# Method -> key that 0.1 had in `train` -> key in `method`.
MOVED: dict[str, dict[str, str]] = {
    "pretraining": {},
    "ee_tuning": _EXITS,
    "joint": _EXITS,
    "sorted_finetuning": {name: name for name in _SORTED},
    "self_supervised_exits": _SELF_SUPERVISED,
    "flextron": _ELASTIC,
    "routers": {name: name for name in _ROUTERS},
    "task_tuning": {name: name for name in _TASK},
}


def upgraded(values: dict[str, Any], *, stored: bool = False) -> dict[str, Any]:
    """A config of 0.1 in the form of today; any other is returned as it is.

    Args:
      values: the sections of a config, plain values; not changed.
      stored: it was written by 0.1 with every option of every method: those of other methods are left out,
        and nothing is warned about.

    Returns:
      The sections.

    Raises:
      ValueError: an option in `train` belongs to another method, or `train.method` contradicts `method.name`.
    """
    if not all(isinstance(values.get(section, {}), dict) for section in ("train", "method")):
        return values  # refused where the dataclasses are built

    train, method = dict(values.get("train", {})), copy.deepcopy(values.get("method", {}))
    old_name = train.pop("method", None)
    name = method.setdefault("name", old_name or ("task_tuning" if "task" in values else "pretraining"))
    require(
        old_name in (None, name),
        "train.method",
        old_name,
        f"the config has method.name={name!r}: set that instead, with the options of the other method",
    )

    moved = {key: new for key, new in MOVED.get(name, {}).items() if key in train}
    for key in [key for key in train if key in OPTIONS and key not in moved]:
        readers = [f"{other} (as method.{keys[key]})" for other, keys in MOVED.items() if key in keys]
        require(
            stored or _same(train[key], OPTIONS[key]),
            f"train.{key}",
            train[key],
            f"not read with method.name={name!r}, only with {', '.join(readers)}",
        )
        del train[key]
    if old_name is None and not moved and len(train) == len(values.get("train", {})):
        return values

    for key, new in moved.items():
        section, _, last = new.rpartition(".")
        target = method.setdefault(section, {}) if section else method
        target[last] = train.pop(key)
    if not stored:
        changes = [f"method.{new} for train.{key}" for key, new in moved.items()]
        warnings.warn(
            "train.method and the options of a method are now in a section of their own: write "
            + ", ".join([f"method.name={name!r}", *changes])
            + "; the old form goes in 0.3",
            FutureWarning,
            stacklevel=3,
        )
    return {**values, "train": train, "method": method}


def _same(value: Any, default: Any) -> bool:
    """Whether a value of a config is 0.1's default, lists counted as tuples."""
    return (tuple(value) if isinstance(value, list) else value) == default

"""Configs of elastic_lm 0.1, where `train` held the method's name and the options of all methods.

They are read for one release, with a warning; run.json files of that form are read without one, so that a run
that 0.1 began can be resumed.
"""

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
    """
    if not all(isinstance(values.get(section, {}), dict) for section in ("train", "method")):
        return values  # refused where the dataclasses are built
    train, method = dict(values.get("train", {})), dict(values.get("method", {}))
    old_name = train.pop("method", None)
    name = method.setdefault("name", old_name or ("task_tuning" if "task" in values else "pretraining"))
    moved = {key: new for key, new in MOVED.get(name, {}).items() if key in train}
    for other, keys in MOVED.items():
        for key in () if stored else keys:
            require(
                key in moved or key not in train,
                f"train.{key}",
                train.get(key),
                f"not read with method.name={name!r}; {other} reads it, as method.{keys[key]}",
            )
    if old_name is None and not moved:
        return values

    for key, new in moved.items():
        section, _, last = new.rpartition(".")
        target = method.setdefault(section, {}) if section else method
        target[last] = train.pop(key)
    if "menu" in method:
        method["menu"].setdefault("heads", (1.0,))  # the default of 0.1
    if stored:
        unread = {key for keys in MOVED.values() for key in keys}
        train = {key: value for key, value in train.items() if key not in unread}
    else:
        changes = [f"method.{new} for train.{key}" for key, new in moved.items()]
        warnings.warn(
            "train.method and the options of a method are now in a section of their own: write "
            + ", ".join([f"method.name={name!r}", *changes])
            + "; the old form goes in 0.3",
            FutureWarning,
            stacklevel=3,
        )
    return {**values, "train": train, "method": method}

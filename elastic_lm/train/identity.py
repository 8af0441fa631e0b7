"""Which run a workdir belongs to: its config, without what may change from one start to the next."""

import json
from pathlib import Path
from typing import Any

from elastic_lm.config.parse import from_dict, parse_json, to_dict
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.train.config import RunConfig, TaskRun, with_seeds
from elastic_lm.train.old_configs import upgraded

AnyRun = RunConfig | TaskRun
FILE = "run.json"
DATA_SEEDS = ("data.seed", "task.seed")
MAY_CHANGE = (
    *("steps", "log_every", "eval_every", "eval_batches"),
    *("save_every", "save_minutes", "keep", "keep_period"),
)


def identity(config: AnyRun) -> dict[str, Any]:
    """The part of a config that makes a run the same run, as JSON values."""
    values = to_dict(with_seeds(config))
    # The seeds that follow `seed` are compared themselves.
    for key in ("mesh", "log", "seed"):
        del values[key]
    for key in MAY_CHANGE:
        del values["train"][key]
    return json.loads(json.dumps(values))


def check_identity(config: AnyRun, workdir: Path) -> None:
    """Refuses a workdir that holds another run.

    Args:
      config: the run that is to start; its steps, logging, evaluation, saving and mesh may differ.
      workdir: its folder; it need not exist.

    Raises:
      ValueError: run.json there differs; names the first key that does, with both values.
    """
    file = workdir / FILE
    if not file.is_file():
        return
    old, new = _flat(_stored(file, config)), _flat(identity(config))
    # The seed of the data comes last: it follows the other, which is what the user has set.
    for key in sorted({**new, **old}, key=lambda key: key in DATA_SEEDS):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{file}: the run there has {key}={old.get(key)!r}, not {new.get(key)!r}: choose another "
                "workdir, or the configuration of that run"
            )


def _stored(file: Path, config: AnyRun) -> dict[str, Any]:
    """The identity in `file`; fields that it does not know yet have their defaults."""
    try:
        values = upgraded(parse_json(file.read_text()), stored=True)
        now = to_dict(config)["train"]
        values["train"] |= {key: now[key] for key in MAY_CHANGE}
        return identity(from_dict(type(config), values))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: does not describe a run ({error}); choose another workdir") from error


def save_identity(config: AnyRun, workdir: Path) -> None:
    """Writes run.json, complete or not at all.

    Args:
      config: the run that starts.
      workdir: its folder; made where it is missing.
    """
    write_text_whole(workdir / FILE, json.dumps(identity(config), indent=2) + "\n")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

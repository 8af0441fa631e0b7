"""Config files: `configs/x.py:argument` and `train.lr=3e-4` to one validated `RunConfig` or `TaskRun`."""

import ast
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.train.config import RunConfig, TaskRun
from elastic_lm.train.old_configs import upgraded

PREFIX = "--config."


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig | TaskRun:
    """Runs a config file and applies overrides.

    Args:
      path: a Python file with `get_config(arg="")` that returns a `RunConfig` or `TaskRun`, or a ConfigDict
        or dict of their sections; what follows a colon is passed to it as `arg`.
      overrides: "train.lr=3e-4", or the same with "--config." in front; values are Python literals,
        true, false, none, or else strings.

    Returns:
      The run; one of a task where the config has a `task` section.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file has no get_config, or a key or value is refused; names it.

    Example:
      ```python
      import pathlib
      import tempfile

      import elastic_lm as el

      recipe = "def get_config(arg): return {'train': {'init_from': 'models/my-model', 'steps': 900}}"
      with tempfile.TemporaryDirectory() as folder:
          pathlib.Path(folder, "mine.py").write_text(recipe)
          run = el.train.load_config(f"{folder}/mine.py", ["train.lr=1e-3"])
      assert (run.train.steps, run.train.lr) == (900, 1e-3)
      ```
    """
    values = _run_file(path)
    for override in overrides:
        key, equals, text = override.removeprefix(PREFIX).partition("=")
        if not equals or (override.startswith("-") and not override.startswith(PREFIX)):
            raise ValueError(f"{override!r} is not an override: write {PREFIX}section.key=value")
        _assign(values, key, _parse(text))
    return from_dict(TaskRun if "task" in values else RunConfig, upgraded(values))


def _run_file(path: str) -> dict[str, Any]:
    name, _, argument = path.partition(".py:")
    file = Path(name if name.endswith(".py") else f"{name}.py")
    if not file.is_file():
        raise FileNotFoundError(f"config file {file} does not exist")

    definitions = runpy.run_path(str(file))
    if "get_config" not in definitions:
        raise ValueError(f"config file {file} has no function get_config")

    config = definitions["get_config"](argument)
    if isinstance(config, RunConfig | TaskRun):
        return to_dict(config)
    return config.to_dict() if hasattr(config, "to_dict") else config


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"{key}: {section} has no keys of its own")
    values[last] = value


def _parse(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

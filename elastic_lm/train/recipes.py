"""Config files: `recipe:argument` and `train.lr=3e-4` to one validated `RunConfig` or `TaskRun`."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.files.python_files import attempt, run_file
from elastic_lm.files.recipes import find_recipe, split_argument
from elastic_lm.train.config import RunConfig, TaskRun
from elastic_lm.train.old_configs import upgraded

PREFIX = "--config."


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig | TaskRun:
    """Runs a config file and applies overrides.

    Args:
      path: the name of a recipe that comes with the package, like "ee_tuning", or a Python file with
        `get_config(arg="")` that returns a `RunConfig` or `TaskRun`, or a ConfigDict
        or dict of their sections; what follows a colon is passed to it as `arg`.
      overrides: "train.lr=3e-4", or the same with "--config." in front; values are Python literals,
        true, false, none, or else strings.

    Returns:
      The run; one of a task where the config has a `task` section.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be run or has no get_config, which names file and line, or a key or value
        is refused, which names that.

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
    name, argument = split_argument(path)
    file = find_recipe(name)
    if file.suffix != ".py":
        raise ValueError(f"config file {file}: a config is a Python file, whose name ends in .py")

    definitions = run_file("config file", file)
    if not callable(definitions.get("get_config")):
        raise ValueError(f"config file {file} has no function get_config: define get_config(arg='')")

    config = attempt("config file", file, lambda: definitions["get_config"](argument))
    if isinstance(config, RunConfig | TaskRun):
        return to_dict(config)
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise ValueError(
            f"config file {file}: get_config returned {values!r}: it must return a RunConfig, a TaskRun, "
            "or a dict of their sections"
        )
    return dict(values)


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

"""Config files: `recipe:argument` and `train.lr=3e-4` to one validated `RunConfig` or `TaskRun`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_lm.config.parse import from_dict, parse_json, to_dict
from elastic_lm.files.python_files import attempt, beside, run_file
from elastic_lm.files.recipes import find_recipe, split_argument
from elastic_lm.train.config import RunConfig, TaskRun
from elastic_lm.train.old_configs import upgraded
from elastic_lm.train.overrides import override, pairs

SUFFIXES = (".py", ".json")


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig | TaskRun:
    """Runs a config file and applies overrides.

    Args:
      path: the name of a recipe that comes with the package, like "ee_tuning", or a Python file with
        `get_config(arg="")` that returns a `RunConfig` or `TaskRun`, or a ConfigDict or dict of their
        sections; what follows a colon is passed to it as `arg`. Or the run_config.json that a run has left.
      overrides: "train.lr=3e-4", or the same with "--config." in front; then the value may be a text of its
        own instead. Values are Python literals, true, false, none, or else strings; references of a
        ConfigDict follow them.

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
    changes = pairs(overrides)
    file, argument = recipe_path(path)
    config: Any = _read_json(file) if file.suffix == ".json" else _run_recipe(file, argument)
    for key, text in changes:
        override(config, key, text)

    if hasattr(config, "to_dict"):  # only now, so that references follow the overrides
        config = attempt("config file", file, config.to_dict)
    return from_dict(TaskRun if "task" in config else RunConfig, upgraded(dict(config)))


def recipe_path(path: str) -> tuple[Path, str]:
    """(file, argument) of a config as it is typed; the argument follows a colon.

    Raises:
      FileNotFoundError: there is no such file, and no such recipe in the package.
      ValueError: it is neither a recipe nor the run_config.json of a run.
    """
    name, argument = split_argument(path)
    file = find_recipe(name)
    if file.suffix == ".gin":
        raise ValueError(f"config file {file}: a gin file is given with --gin_file")
    if file.suffix not in SUFFIXES:
        raise ValueError(
            f"config file {file}: a config is a Python file, whose name ends in .py, or the run_config.json "
            "of a run"
        )
    return file, argument


def _run_recipe(file: Path, argument: str) -> Any:
    """The sections that a recipe returns: a dict of its own, or a ConfigDict."""
    with beside(file):
        definitions = run_file("config file", file)
        if not callable(definitions.get("get_config")):
            raise ValueError(f"config file {file} has no function get_config: define get_config(arg='')")
        config = attempt("config file", file, lambda: definitions["get_config"](argument))

    if isinstance(config, RunConfig | TaskRun):
        return to_dict(config)
    if hasattr(config, "as_configdict"):  # a frozen one
        config = config.as_configdict()
    if hasattr(config, "ignore_type"):
        return config
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise ValueError(
            f"config file {file}: get_config returned {values!r}: it must return a RunConfig, a TaskRun, "
            "or a dict of their sections"
        )
    return dict(values)


def _read_json(file: Path) -> dict[str, Any]:
    """The sections in the run_config.json of a run."""
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"config file {file}: is not JSON ({error}); give the run_config.json of a run"
        ) from error
    if not isinstance(values, dict) or "train" not in values:
        raise ValueError(f"config file {file}: describes no run; give the run_config.json of one")
    return values

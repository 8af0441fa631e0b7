"""Config files: `configs/x.py:argument` and `train.lr=3e-4` to one validated `RunConfig` or `TaskRun`."""

import ast
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
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
    name, colon, argument = path.partition(".py:")
    file = _config_file(f"{name}.py" if colon else path)

    definitions = _attempt(file, lambda: runpy.run_path(str(file)))
    if not callable(definitions.get("get_config")):
        raise ValueError(f"config file {file} has no function get_config: define get_config(arg='')")

    config = _attempt(file, lambda: definitions["get_config"](argument))
    if isinstance(config, RunConfig | TaskRun):
        return to_dict(config)
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise ValueError(
            f"config file {file}: get_config returned {values!r}: it must return a RunConfig, a TaskRun, "
            "or a dict of their sections"
        )
    return dict(values)


def _config_file(path: str) -> Path:
    """The file of a config; its name may leave out ".py"."""
    file = Path(path)
    if file.suffix != ".py" and Path(f"{path}.py").is_file():
        return Path(f"{path}.py")
    if not file.is_file():
        raise FileNotFoundError(f"config file {file} does not exist")
    if file.suffix != ".py":
        raise ValueError(f"config file {file}: a config is a Python file, whose name ends in .py")
    return file


def _attempt(file: Path, run: Callable[[], Any]) -> Any:
    """What `run` gives; whatever the code of a config raises names the file and the line.

    Raises:
      ValueError: the code raised an error, or ended the program.
    """
    try:
        return run()
    except (Exception, SystemExit) as error:
        raise ValueError(f"config file {_place(file, error)}: {_complaint(error)}") from error


def _place(file: Path, error: BaseException) -> str:
    """The file and line of a config's error: its last line, as what it calls may fail far away."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or file} line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return f"{file} line {lines[-1]}" if lines else str(file)


def _complaint(error: BaseException) -> str:
    """What a config's error says, and the fix."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}; fix this line"
    if type(error) is ValueError:
        return str(error)  # a refusal, by the config or by what it calls, which has a fix of its own
    fix = "install it, or fix the file" if isinstance(error, ImportError) else "fix the file"
    return f"{type(error).__name__}: {error}; {fix}"


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

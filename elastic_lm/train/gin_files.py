"""Runs from gin files: `TrainConfig.lr = 3e-4` binds the same dataclasses that a Python recipe makes.

All dataclasses of a run are configurables under their own names (`el.TrainConfig` in full), the options of
every method among them. A file says `RunConfig.method = @EETuningConfig()` and lists `exits`; the sections
`data`, `train`, `mesh` and `log` need not be named. Where `TaskConfig` is bound, the run is a `TaskRun`.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from elastic_lm.checkpoints.embedded import embedded_model
from elastic_lm.config.data import DataConfig
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.log import LogConfig
from elastic_lm.config.mesh import MeshConfig
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.rope import RopeConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.config.task import TaskConfig
from elastic_lm.files.python_files import beside
from elastic_lm.files.recipes import find_recipe
from elastic_lm.train import registry
from elastic_lm.train.config import RunConfig, TaskRun, TrainConfig

MODULE = "el"
CLASSES = (RunConfig, TaskRun, TrainConfig, DataConfig, TaskConfig, MeshConfig, LogConfig, ModelConfig)
CLASSES += (EncoderConfig, EncoderDecoderConfig, ExitConfig, RopeConfig, Menu)
# Sections that a file need not name: they are made of what is bound for their classes.
SECTIONS: dict[type, dict[str, type]] = {
    RunConfig: {"data": DataConfig, "train": TrainConfig, "mesh": MeshConfig, "log": LogConfig},
    TaskRun: {"task": TaskConfig, "train": TrainConfig, "mesh": MeshConfig, "log": LogConfig},
}
PLACE = re.compile(r'In (?:file "(?P<file>[^"]*)",|bindings string) line (?P<line>\d+)')
NO_PARAMETER = re.compile(r"Configurable '(?P<name>\w+)' doesn't have a parameter named '(?P<parameter>\w+)'")
NO_CONFIGURABLE = re.compile(r"No configurable matching (?:reference )?'@?(?P<name>[^'(]+)(?:\(\))?'")
NO_MACRO = re.compile(r"In call to configurable 'macro' .* in scope '(?P<name>[^']+)'")


def load_gin(files: Sequence[str | Path] = (), params: Sequence[str] = ()) -> RunConfig | TaskRun:
    """The run that gin files and bindings describe. Bindings of your own program are left as they are.

    Args:
      files: gin files; what a later one binds replaces what an earlier one does.
      params: bindings such as "TrainConfig.lr = 3e-4", read after the files.

    Returns:
      The run; one of a task where `TaskConfig` is bound.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file cannot be read, a name or value is refused, nothing reads a binding, or gin-config is
        not installed; names it.

    Example:
      ```python
      import elastic_lm as el

      bindings = ["TrainConfig.init_from = 'models/my-model'", "TrainConfig.steps = 900"]
      run = el.train.load_gin(params=bindings)
      assert (run.train.steps, run.method.name) == (900, "pretraining")
      ```
    """
    return read_gin(files, params)[0]


def read_gin(files: Sequence[str | Path] = (), params: Sequence[str] = ()) -> tuple[RunConfig | TaskRun, str]:
    """As `load_gin`, with gin's operative config: every value that was read, as a gin file.

    Returns:
      (run, text of the gin file).
    """
    gin = _gin()
    _register()
    places = [find_recipe(str(path), ".gin") for path in files]
    with _clean(gin, [str(place.parent) for place in places]):
        for place in places:
            with _in_one_line(f"gin file {place}"), beside(place, forget=False):
                gin.parse_config_file(str(place.absolute()))
        for param in params:
            with _in_one_line(f"--gin_param {param!r}"):
                gin.parse_config(param)

        run = _make(gin)
        return run, gin.operative_config_str()


def _gin() -> Any:
    try:
        return importlib.import_module("gin")
    except ImportError:
        raise ValueError('gin files need gin-config: pip install "elastic-lm[gin]"') from None


def _embedded_model() -> str:
    """Folder of the small model that comes with the package."""
    return str(embedded_model())


def _register() -> None:
    """Makes configurables of the dataclasses, and of the options of every method that is known by now."""
    _register_function()
    for cls in CLASSES:
        _register_class(cls)
    for name in registry.names():
        _register_class(registry.method_class(name).section)


@functools.cache
def _register_function() -> None:
    _gin().external_configurable(_embedded_model, name="embedded_model", module=MODULE)


@functools.cache
def _register_class(cls: type) -> None:
    gin = _gin()
    # Another class of the same name takes its place: a recipe that was run again defines its method anew.
    with gin.config.interactive_mode():
        gin.external_configurable(cls, name=cls.__name__, module=MODULE)


@contextlib.contextmanager
def _clean(gin: Any, folders: list[str]) -> Iterator[None]:
    """gin without bindings, which looks for included files in `folders` too; what it had is put back.

    gin has one state for the whole process, which may be the user's own.
    """
    core = gin.config
    kept = (core._CONFIG, core._OPERATIVE_CONFIG, core._IMPORTS, core._SINGLETONS)
    before = [state.copy() for state in kept]
    prefixes, locked = list(core._LOCATION_PREFIXES), gin.config_is_locked()
    gin.clear_config()
    core._LOCATION_PREFIXES[:] = [*folders, *prefixes]
    try:
        yield
    finally:
        gin.clear_config()
        for state, old in zip(kept, before, strict=True):
            state.update(old)
        core._LOCATION_PREFIXES[:] = prefixes
        core._set_config_is_locked(locked)


def _make(gin: Any) -> RunConfig | TaskRun:
    """The run that the bindings describe."""
    bound = {selector for _, selector in gin.config._CONFIG}
    kind = TaskRun if bound & {f"{MODULE}.TaskRun", f"{MODULE}.TaskConfig"} else RunConfig
    given = gin.get_bindings(f"{MODULE}.{kind.__name__}", resolve_references=False)
    for section, cls in SECTIONS[kind].items():
        if section not in given:
            gin.parse_config(f"{MODULE}.{kind.__name__}.{section} = @{MODULE}.{cls.__name__}()")

    with _in_one_line("gin"):
        run = gin.get_configurable(f"{MODULE}.{kind.__name__}")()
    _check_all_read(gin, run)
    return run


def _check_all_read(gin: Any, run: RunConfig | TaskRun) -> None:
    """Refuses bindings of this package that nothing has read."""
    read = gin.config._OPERATIVE_CONFIG
    for (scope, selector), values in gin.config._CONFIG.items():
        if not selector.startswith(f"{MODULE}."):
            continue
        inside = [
            s for s, name in read if name == selector and (f"{s}/".startswith(f"{scope}/") or not scope)
        ]
        name = "/".join(filter(None, (scope, selector.removeprefix(f"{MODULE}."))))
        if not inside:
            parameter, value = next(iter(values.items()))
            raise ValueError(
                f"{name}.{parameter}={value!r}: nothing reads it: this {type(run).__name__} with "
                f"method.name={run.method.name!r} has no {name}; leave it out, or refer to it as @{name}()"
            )


@contextlib.contextmanager
def _in_one_line(where: str) -> Iterator[None]:
    """Errors of gin, which add the place on further lines, become a ValueError of one line.

    Args:
      where: what is read, for messages that name no file.
    """
    try:
        yield
    except Exception as error:
        _refuse(error, where)


def _refuse(error: Exception, where: str) -> NoReturn:
    if isinstance(error, SyntaxError):
        line = f" line {error.lineno}" if error.lineno else ""
        raise ValueError(f"{error.filename or where}{line}: {error.msg}; fix the line") from error

    text = str(error)
    message = re.split(r"\n\s*(?:In |No values |Gin had )", text, maxsplit=1)[0]
    message = " ".join(message.split()).rstrip(".")
    if place := PLACE.search(text):
        where = f"gin file {place['file']} line {place['line']}" if place["file"] else where
    if isinstance(error, OSError):
        raise FileNotFoundError(f"{where}: {message}") from error

    if match := NO_PARAMETER.search(message):
        known = [field.name for field in dataclasses.fields(_class_of(match["name"]))]
        message = f"{match['name']} has no parameter {match['parameter']}{_near(match['parameter'], known)}"
    elif match := NO_CONFIGURABLE.search(message):
        message = f"there is no {match['name']}{_near(match['name'], _names())}"
    elif match := NO_MACRO.search(text):
        message = f"%{match['name']} is bound nowhere; write {match['name']} = VALUE"
    elif isinstance(error, TypeError) and (call := re.search(r"In call to configurable '(\w+)'", text)):
        message = f"{message.replace('.__init__()', '').replace('()', '')}; bind {call[1]}.NAME"
    elif isinstance(error, ValueError) and "In call to configurable" in text:
        raise ValueError(message) from error  # of the dataclasses, which say what to do
    raise ValueError(f"{where}: {message}") from error


def _sections() -> list[type]:
    return [*CLASSES, *(registry.method_class(name).section for name in registry.names())]


def _names() -> list[str]:
    return [cls.__name__ for cls in _sections()]


def _class_of(name: str) -> Any:
    """The dataclass of that name; `RunConfig` where it is one of the user's."""
    return next((cls for cls in _sections() if cls.__name__ == name), RunConfig)


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"

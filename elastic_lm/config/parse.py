"""Dataclasses from plain values (JSON, config files, overrides) and back."""

import codecs
import dataclasses
import difflib
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from elastic_lm.config.checks import is_number, require

DEEPEST = 100  # lists and objects within each other; no file of ours has ten


def to_dict(config: Any) -> dict[str, Any]:
    """Turns any config dataclass into plain JSON-compatible dicts and lists."""
    return dataclasses.asdict(config)


def from_dict(cls: Any, values: Any, where: str = "", default: Any = None) -> Any:
    """Builds config dataclass `cls` from nested dicts, refusing unknown and missing keys.

    Args:
      cls: a dataclass (nested dataclass fields are built too).
      values: mapping from field names to values; missing fields take their defaults.
      where: dotted prefix used in messages.
      default: an instance of `cls` that missing fields are taken from; None = the defaults of `cls`.

    Returns:
      An instance of `cls`.

    Raises:
      ValueError: `values` is no mapping, a key is unknown (with the closest known one) or missing, or a
        value is refused by `cls`.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    name = where.rstrip(".") or cls.__name__
    require(isinstance(values, Mapping), name, values, f"must be a mapping like {{{known[0]!r}: ...}}")
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {where}{key}={value!r}: {hint}")
        kwargs[key] = _coerce(hints[key], value, f"{where}{key}", defaults[key])
    if default is not None:
        return dataclasses.replace(default, **kwargs)
    missing = [where + f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in kwargs]
    if missing:
        raise ValueError(f"{name}={dict(values)!r}: needs {', '.join(missing)}; add what is missing")
    return cls(**kwargs)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that may be anybody's.

    Args:
      text: UTF-8.

    Returns:
      The value, of at most `DEEPEST` lists and objects within each other.

    Raises:
      ValueError: it is not JSON, or is nested more deeply, which would end in an error of Python's stack here
        or where it is written again.
    """
    # Editors of Windows put a byte order mark before the text.
    text = text.removeprefix("\ufeff") if isinstance(text, str) else text.removeprefix(codecs.BOM_UTF8)
    deep = f"lists and objects are nested more than {DEEPEST} deep"
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(deep) from None

    brackets = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    opened = sum(text.count(bracket) for bracket in brackets)  # pyright: ignore[reportArgumentType]
    level = [value] if opened > DEEPEST and isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inner = [part.values() if isinstance(part, dict) else part for part in level]
        level = [one for part in inner for one in part if isinstance(one, dict | list)]
        if not level:
            return value
    raise ValueError(deep)


def load_dataclass(cls: Any, path: str | Path, form: str, name: str, fix: str) -> Any:
    """Builds a dataclass from a JSON file that says what it is.

    Args:
      cls: the dataclass.
      path: the file.
      form: what its "format" has to be.
      name: what such a file is called in messages.
      fix: how one is made.

    Returns:
      An instance of `cls`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, of another format, or holds values out of range; names the field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {name}; {fix}")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != form:
            raise ValueError(f'"format" is not "{form}"')
        return from_dict(cls, content)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a usable {name} ({error}); {fix}") from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _coerce(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    """Turns JSON's lists and dicts into the tuples and dataclasses that `hint` asks for.

    Args:
      hint: type of the field.
      value: of the field.
      where: name of the field, for messages.
      default: of the field. A section of the same class takes from it what `value` leaves out.
    """
    if get_origin(hint) in (Union, types.UnionType):
        hints = [arg for arg in get_args(hint) if arg is not type(None)]
        if value is None or len(hints) > 1:
            return value  # of several types the class itself looks at the value
        hint = hints[0]
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # pyright: ignore[reportArgumentType]
            return value
        # A base class, like that of the `method` sections, knows which of its subclasses the values describe.
        resolve = getattr(hint, "resolve", None)
        cls = hint if resolve is None else resolve(value, where)
        return from_dict(cls, value, where + ".", default if type(default) is cls else None)
    if get_origin(hint) is tuple:
        of = get_args(hint)[0]
        if isinstance(value, str) and of is str:
            return (value,)  # the usual case of paths
        instead = () if value is None else (str(value) if of is str else value,)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}={value!r}: must be a tuple: write {instead!r}")
        return tuple(_coerce(of, v, f"{where}[{i}]") for i, v in enumerate(value))
    if get_origin(hint) in (Mapping, dict):
        require(isinstance(value, Mapping), where, value, "must be a mapping like {'key': ...}")
    if hint in (int, float, str, bool):
        right = type(value) is hint or (hint is float and type(value) is int)
        require(right, where, value, f"must be of type {hint.__name__}")
        require(hint is not float or is_number(value), where, value, "must be a number below 1.8e308")
    return value

"""Dataclasses from plain values (JSON, config files, overrides) and back, and their files; refusals name
field and fix."""

import dataclasses
import difflib
import json
import math
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

AT_LEAST_1 = (lambda value: value >= 1, "must be at least 1")
NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "must be at least 0 and finite")
POSITIVE = (lambda value: 0 < value < math.inf, "must be positive and finite")
SEED = (lambda value: 0 <= value < 2**32, "must be in [0, 2**32)")


def require(ok: bool, field: str, value: object, fix: str) -> None:
    """Raises ValueError "field=value: fix" unless `ok`."""
    if not ok:
        raise ValueError(f"{field}={value!r}: {fix}")


def require_each(
    config: Any, where: str, fields: tuple[str, ...], ok: Callable[[Any], bool], fix: str
) -> None:
    """`require` for several fields of `config`, whose names get the prefix `where`."""
    for field in fields:
        require(ok(getattr(config, field)), where + field, getattr(config, field), fix)


def require_defaults(config: Any, where: str, fields: tuple[str, ...], fix: str) -> None:
    """`require` that these fields of the dataclass `config`, which nothing reads, were left alone."""
    for field in dataclasses.fields(config):
        if field.name in fields:
            value = getattr(config, field.name)
            require(value == field.default, where + field.name, value, f"{fix} {field.default!r}")


def require_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """`require` for a value that must be one of `choices`."""
    require(value in choices, field, value, f"must be one of {', '.join(choices)}")


def require_shares(field: str, shares: tuple[float, ...]) -> None:
    """`require` for the choices of a menu: fractions of the whole in increasing order, the last one 1."""
    right = list(shares) == sorted(set(shares)) and shares[-1:] == (1.0,) and shares[0] > 0
    require(right, field, shares, "must be shares in (0, 1], increasing, the last one 1.0")


def to_dict(config: Any) -> dict[str, Any]:
    """Turns any config dataclass into plain JSON-compatible dicts and lists."""
    return dataclasses.asdict(config)


def read_json(path: Any) -> dict[str, Any]:
    """Parses a file (a `pathlib` or `epath` path) that holds a JSON object.

    Raises:
      ValueError: it does not hold one; names file and position.
    """
    again = "download or copy the file again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {again}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(value).__name__}; {again}")
    return value


def partial_path(path: str | Path) -> Path | None:
    """Where `write_text_whole` writes a file before it appears.

    Args:
      path: the file; its folder exists.

    Returns:
      A path beside it; None for links, pipes and devices, and in folders that take no new files.
    """
    path = Path(path)
    replaceable = not path.is_symlink() and (path.is_file() or not path.exists())
    takes_files = os.access(path.parent, os.W_OK)
    return path.with_name(path.name + ".partial") if replaceable and takes_files else None


def write_text_whole(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file that appears complete or not at all; what a crash leaves has a name of its own.

    Args:
      path: the file; its folder is made where it is missing. Where `partial_path` gives None it is written
        to as it is.
      text: what it will hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    (partial or path).write_text(text, encoding="utf-8")
    if partial:
        partial.replace(path)


def from_dict(cls: Any, values: Any, where: str = "") -> Any:
    """Builds config dataclass `cls` from nested dicts, refusing unknown and missing keys.

    Args:
      cls: a dataclass (nested dataclass fields are built too).
      values: mapping from field names to values; missing fields take their defaults.
      where: dotted prefix used in messages.

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
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {where}{key}={value!r}: {hint}")
        kwargs[key] = _coerce(hints[key], value, f"{where}{key}")
    missing = [where + f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in kwargs]
    if missing:
        raise ValueError(f"{name}={dict(values)!r}: needs {', '.join(missing)}; add what is missing")
    return cls(**kwargs)


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
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != form:
            raise ValueError(f'"format" is not "{form}"')
        return from_dict(cls, content)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a usable {name} ({error}); {fix}") from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Turns JSON's lists and dicts into the tuples and dataclasses that `hint` asks for."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return value
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if dataclasses.is_dataclass(hint):
        return value if type(value) is hint else from_dict(hint, value, where + ".")
    if get_origin(hint) is tuple:
        instead = () if value is None else (value,)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}={value!r}: must be a tuple: write {instead!r}")
        return tuple(_coerce(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint in (int, float, str, bool):
        right = type(value) is hint or (hint is float and type(value) is int)
        require(right, where, value, f"must be of type {hint.__name__}")
    return value

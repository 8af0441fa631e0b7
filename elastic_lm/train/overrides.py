"""Overrides of a config on the command line: `--config.train.lr=3e-4`, `--config.exits[0].layer 2`."""

import ast
import contextlib
import re
from collections.abc import Sequence
from typing import Any

PREFIX = "--config."
WORDS = {"true": True, "false": False, "none": None}
INDEX = re.compile(r"\[(-?\d+)\]")
PART = re.compile(r"([^\[\]]+)((?:\[-?\d+\])*)$")


def pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """(key, text of the value) of every override.

    Args:
      overrides: "train.lr=3e-4", with or without "--config." in front; or two texts, the first with it.

    Raises:
      ValueError: one is no override, or has no value.
    """
    found, rest = [], list(overrides)
    while rest:
        override = rest.pop(0)
        key, equals, text = override.removeprefix(PREFIX).partition("=")
        named = override.startswith(PREFIX)
        if not equals and named and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        if not equals or (override.startswith("-") and not named):
            raise ValueError(f"{override!r} is not an override: write {PREFIX}section.key=value")
        found.append((key, text))
    return found


def override(config: Any, key: str, text: str) -> None:
    """Sets one value of a config, in place.

    Args:
      config: a dict or an `ml_collections.ConfigDict`, whose references follow.
      key: path of the value: names with dots between them, each with an index behind it where it is a list.
      text: as it was typed: a Python literal, true, false, none, or else a text. A value that was a text
        stays one: 5 is "5" there.

    Raises:
      ValueError: the path leads through something that has no keys, or past the end of a list.
    """
    path = _path(key)
    holders, value = [config], config
    for depth, part in enumerate(path[:-1]):
        if isinstance(part, str) and _has_keys(value) and (part not in value or _entry(value, part) is None):
            _set(value, part, [] if isinstance(path[depth + 1], int) else {})
        value = _inner(value, part, key)
        holders.append(value)

    last = path[-1]
    is_new = isinstance(last, str) and _has_keys(value) and last not in value
    new = parsed(text, None if is_new else _inner(value, last, key))

    # Tuples cannot be changed: each is replaced in what holds it.
    for holder, part in reversed(list(zip(holders, path, strict=True))):
        if not isinstance(holder, tuple):
            return _set(holder, part, new)
        new = tuple(new if i == int(part) % len(holder) else one for i, one in enumerate(holder))


def parsed(text: str, before: Any = None) -> Any:
    """The value of a text that was typed, where `before` stood."""
    try:
        literal = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        literal = text
    if isinstance(before, str):
        return literal if isinstance(literal, str) else text
    return WORDS.get(text.lower(), literal)


def _path(key: str) -> list[str | int]:
    path: list[str | int] = []
    for part in key.split("."):
        match = PART.match(part)
        if match is None:
            raise ValueError(f"{key!r} is not the key of a config: write section.key or section[0].key")
        path += [match[1], *(int(index) for index in INDEX.findall(match[2]))]
    return path


def _has_keys(value: Any) -> bool:
    return hasattr(value, "keys")


def _inner(value: Any, part: str | int, key: str) -> Any:
    """What `part` of a path stands for."""
    if isinstance(part, str):
        if not _has_keys(value):
            before = key.rpartition(f".{part}")[0]
            raise ValueError(f"{key}: {before.rpartition('.')[2] or before} has no keys of its own")
        return _entry(value, part)
    before = key.partition(f"[{part}]")[0]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key}: {before} is no list; leave [{part}] out")
    if not -len(value) <= part < len(value):
        raise ValueError(
            f"{key}: {before} has {len(value)} entries, counted from 0; name one, or set all of them"
        )
    return value[part]


def _entry(holder: Any, part: str) -> Any:
    """A value of a dict or ConfigDict; None for a placeholder that nobody has filled."""
    if not hasattr(holder, "ignore_type"):
        return holder[part]
    from ml_collections.config_dict import RequiredValueError  # late: only a ConfigDict needs it

    try:
        return holder[part]
    except RequiredValueError:
        return None


def _set(holder: Any, part: str | int, value: Any) -> None:
    with contextlib.ExitStack() as stack:
        if hasattr(holder, "ignore_type"):  # a ConfigDict; the dataclasses check types
            stack.enter_context(holder.ignore_type())
            stack.enter_context(holder.unlocked())
        holder[part] = value

"""Checks of fields: each refusal names the field, its value and the fix."""

import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any, Union, get_args, get_origin, get_type_hints

LARGEST_INT = 2**31 - 1  # what an int32 holds; larger numbers would wrap around on the device
MOST_LAYERS = 4096


def is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold: no text, no None, no integer of 400 digits."""
    if not isinstance(value, numbers.Real):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_whole(value: Any, low: int = 0, high: int = LARGEST_INT) -> bool:
    """Whether a value is an integer within bounds; a truth value is none, and 1.0 neither."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


AT_LEAST_1 = (
    lambda value: is_whole(value, 1),
    "must be at least 1, and below 2**31, and whole",
)
NOT_NEGATIVE = (lambda value: is_number(value) and 0 <= value < math.inf, "must be at least 0 and finite")
POSITIVE = (lambda value: is_number(value) and 0 < value < math.inf, "must be positive and finite")
SEED = (lambda value: is_number(value) and 0 <= value < 2**32, "must be in [0, 2**32)")

# Types of fields, what their values may be besides (NumPy's numbers are registered as such), and in words.
KINDS: dict[Any, tuple[Any, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    bool: (bool, "True or False"),
}


def require(ok: bool, field: str, value: object, fix: str) -> None:
    """Raises ValueError "field=value: fix" unless `ok`."""
    if not ok:
        raise ValueError(f"{field}={value!r}: {fix}")


def require_at_least_1(field: str, value: float) -> None:
    """`require` for a count or a size."""
    require(AT_LEAST_1[0](value), field, value, AT_LEAST_1[1])


def require_not_negative(field: str, value: float) -> None:
    """`require` for a finite number from 0."""
    require(NOT_NEGATIVE[0](value), field, value, NOT_NEGATIVE[1])


def require_positive(field: str, value: float) -> None:
    """`require` for a finite number above 0."""
    require(POSITIVE[0](value), field, value, POSITIVE[1])


def require_seed(field: str, value: float | None) -> None:
    """`require` for a seed; None = that of something else."""
    require(value is None or SEED[0](value), field, value, SEED[1])


def require_layers(field: str, value: int) -> None:
    """`require` for a number of layers: everything that describes a model grows with it."""
    fix = f"must be at least 1, and at most {MOST_LAYERS:,}, which no model has"
    require(is_whole(value, 1, MOST_LAYERS), field, value, fix)


def require_ids(field: str, ids: Iterable[Any], low: int = 0) -> None:
    """`require` for token ids."""
    ids = tuple(ids)
    whole = all(is_whole(i, low) for i in ids)
    require(whole, field, ids, f"must be token ids: integers of at least {low}, below 2**31")


def require_each(
    config: Any, where: str, fields: tuple[str, ...], ok: Callable[[Any], bool], fix: str
) -> None:
    """`require` for several fields of `config`, whose names get the prefix `where`."""
    for field in fields:
        require(ok(getattr(config, field)), where + field, getattr(config, field), fix)


def require_types(config: Any, where: str = "") -> None:
    """`require` that the fields of a dataclass are of their types.

    Python does not look, and a field of another type is understood in some other way, or fails far away.
    Numbers, texts, booleans, dataclasses, and tuples of these are looked at; other types are not.

    Args:
      config: an instance of the dataclass.
      where: prefix of the names of its fields.
    """
    for name, hint in _field_types(type(config)).items():
        require_type(where + name, getattr(config, name), hint)


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def is_truth(value: object) -> bool:
    """Whether a value is True or False, NumPy's included, which is not imported for that."""
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def require_type(field: str, value: Any, hint: Any) -> None:
    """`require` that a value is of the type `hint`, as `require_types` reads types."""
    if get_origin(hint) in (Union, types.UnionType):
        hints = [one for one in get_args(hint) if one is not types.NoneType]
        optional = len(hints) < len(get_args(hint))
        if len(hints) == 1 and not (optional and value is None):
            require_type(field, value, hints[0])
    elif get_origin(hint) is tuple:
        instead = tuple(value) if isinstance(value, list) else (value,)
        require(isinstance(value, tuple), field, value, f"must be a tuple: write {instead!r}")
        for i, one in enumerate(value):
            require_type(f"{field}[{i}]", one, get_args(hint)[0])
    elif hint in KINDS:
        kind, words = KINDS[hint]
        right = is_truth(value) if hint is bool else isinstance(value, kind) and not isinstance(value, bool)
        require(right, field, value, f"must be {words}")
        require(hint is not float or is_number(value), field, value, "must be a number below 1.8e308")
    elif get_origin(hint) is Mapping:
        require(isinstance(value, Mapping), field, value, "must be a mapping like {'key': ...}")
    elif dataclasses.is_dataclass(hint):
        name = getattr(hint, "__name__", str(hint))
        require(isinstance(value, hint), field, value, f"must be of type {name}")  # pyright: ignore[reportArgumentType]


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

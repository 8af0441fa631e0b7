"""Numbers beyond 32 bits, and JSON that is nested without an end."""

import json
from typing import Any

import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.config.cascade import without_secrets
from elastic_lm.config.checks import (
    AT_LEAST_1,
    LARGEST_INT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    is_whole,
    require_at_least_1,
    require_ids,
    require_type,
)
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.parse import DEEPEST, from_dict, parse_json
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.testing import tiny_config


def test_whole_numbers() -> None:
    assert is_whole(0)
    assert is_whole(LARGEST_INT)
    for value in (-1, 2**31, 1.0, True, "1", None):
        assert not is_whole(value)
    assert AT_LEAST_1[0](LARGEST_INT)
    with pytest.raises(ValueError, match=r"n=2147483648: must be at least 1, and below 2\*\*31"):
        require_at_least_1("n", 2**31)
    with pytest.raises(ValueError, match=r"ids=\(1, 2147483648\)"):
        require_ids("ids", [1, 2**31])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 2**31),
        ("d_mlp", 10**12),
        ("max_len", 2**31),
        ("n_layers", 4097),
        ("windows", (2**31,) * 4),
        ("eos_ids", (2**31,)),
        ("bos_id", 2**31),
    ],
)
def test_models(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}="):
        tiny_config(**{field: value})


def test_encoders() -> None:
    with pytest.raises(ValueError, match="n_layers=1000000: must be at least 1, and at most 4,096"):
        EncoderConfig(vocab_size=8, d_model=8, n_layers=10**6, n_heads=2, d_mlp=8)


@pytest.mark.parametrize("kind", [str, str.encode])
def test_json_of_any_depth(kind) -> None:
    value = parse_json(kind("[" * DEEPEST + "]" * DEEPEST))
    assert value == json.loads("[" * DEEPEST + "]" * DEEPEST)
    assert parse_json(kind("[" + '{"a": 1},' * 500 + "1]"))[0] == {"a": 1}  # wide is not deep
    assert parse_json(kind(json.dumps("[" * 300))) == "[" * 300
    deeper = DEEPEST + 1
    for text in ("[" * deeper + "]" * deeper, '{"a":' * deeper + "1" + "}" * deeper, "[" * 10**6):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_json(kind(text))
    with pytest.raises(ValueError, match=f"more than {DEEPEST} deep"):
        parse_json(kind("[" * deeper + "]" * deeper))


@pytest.mark.parametrize("value", [None, "x", [1]])
def test_mappings_are_mappings(value: object) -> None:
    with pytest.raises(ValueError, match=r"provenance=.*must be a mapping"):
        from_dict(ConfidenceExit, {"metric": "max_prob", "thresholds": [], "layers": [], "provenance": value})


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("http://me:secret@host:8000/x", "http://host:8000/x"),
        ("https://me:s%40cret@host/x?a=1", "https://host/x?a=1"),
        ("http://host/x?api_key=secret&n=2", "http://host/x?api_key=***&n=2"),
        ("http://me@host/@x", "http://host/@x"),
        ("http://[::1/x", "http://***"),
        ("runs/x@y:z", "runs/x@y:z"),
    ],
)
def test_addresses_as_they_are_shown(place: str, shown: str) -> None:
    assert without_secrets(place) == shown


@pytest.mark.parametrize("mark", ["\ufeff", b"\xef\xbb\xbf"])
def test_json_may_begin_with_a_byte_order_mark(mark: str | bytes) -> None:
    assert parse_json(mark + ('{"a": 1}' if isinstance(mark, str) else b'{"a": 1}')) == {"a": 1}  # pyright: ignore[reportOperatorIssue]


def test_numbers_that_no_float_holds_are_refused() -> None:
    huge = 10**400
    for check in (NOT_NEGATIVE, POSITIVE, SEED, AT_LEAST_1):
        assert not check[0](huge)
    with pytest.raises(ValueError, match=r"thresholds\[0\]=1.*: must be a number below 1.8e308"):
        from_dict(el.ConfidenceExit, {"metric": "margin", "thresholds": [huge], "layers": [1]})
    with pytest.raises(ValueError, match=r"threshold=1.*: must be a number below 1.8e308"):
        el.CascadeRule(huge)


def test_sizes_are_whole_and_factors_are_not() -> None:
    assert [AT_LEAST_1[0](value) for value in (1, np.int64(2), 2.5, 2.0, True)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert el.RopeConfig(scaling="dynamic", factor=2.5).factor == 2.5


def test_truth_of_numpy_is_truth() -> None:
    require_type("on", np.bool_(True), bool)
    with pytest.raises(ValueError, match="on=1: must be True or False"):
        require_type("on", 1, bool)


def test_provenance_is_a_mapping() -> None:
    none: Any = None
    with pytest.raises(ValueError, match="provenance=None: must be a mapping"):
        el.ConfidenceExit("margin", (0.5,), (1,), provenance=none)
    with pytest.raises(ValueError, match="provenance=None: must be a mapping"):
        el.CascadeRule(1.0, provenance=none)

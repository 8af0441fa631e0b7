"""Failure slices: rates and intervals of the parts behind an average."""

import json

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.bounds import rate_interval
from elastic_lm.report.slices import FailureSlices, failure_slices, length_buckets

ITEMS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.booleans(), st.integers(0, 3), st.integers(0, 4)), min_size=1
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(ITEMS)
def test_slices_are_what_counting_by_hand_gives(items: list[tuple[str, bool, int, int]]) -> None:
    keys, agrees, weights, groups = map(list, zip(*items, strict=True))
    if not sum(weights):
        weights = [1] * len(items)
    found = failure_slices(agrees, {"file": keys}, weights=weights, groups=groups, least=1)

    assert found.average.agreement == pytest.approx(np.average(agrees, weights=weights))
    by_name = {one.name: one for one in found.slices}
    counted = [i for i, w in enumerate(weights) if w]
    assert set(by_name) == {keys[i] for i in counted}
    for name, one in by_name.items():
        own = [i for i in counted if keys[i] == name]
        rate = np.average([agrees[i] for i in own], weights=[weights[i] for i in own])
        assert one.agreement == pytest.approx(rate)
        assert one.items == len(own)
        assert one.low <= one.agreement <= one.high
    order = [(one.few, one.agreement) for one in found.slices]  # those of one group are told last
    assert order == sorted(order)
    assert FailureSlices.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(("wrong", "n"), [(0, 40), (3, 40), (40, 40), (250, 1000)])
def test_intervals_of_independent_items_are_scipys(wrong: int, n: int) -> None:
    agrees = np.arange(n) >= wrong
    least = failure_slices(agrees, {"file": ["a"] * n}, epsilon=0.1).slices[0]
    exact = scipy.stats.binomtest(n - wrong, n).proportion_ci(0.9, method="exact")
    assert (least.low, least.high) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_items_of_one_text_widen_the_interval() -> None:
    alike = np.repeat(np.random.default_rng(0).uniform(size=50) < 0.7, 20)
    text = np.repeat(np.arange(50), 20)
    alone = failure_slices(alike, {"file": ["a"] * 1000}).average
    together = failure_slices(alike, {"file": ["a"] * 1000}, groups=text).average
    assert alone.agreement == together.agreement
    expected = rate_interval(float(alike.mean()), 50, 0.05)
    assert (together.low, together.high) == pytest.approx(expected, abs=0.01)
    assert alone.high - alone.low < (together.high - together.low) / 3


def test_slices_of_few_items_stand_together_and_last() -> None:
    keys = ["big"] * 100 + ["x"] * 3 + ["y"] * 2
    found = failure_slices([1] * 100 + [0] * 5, {"file": keys}, least=10)
    assert [(s.name, s.items, s.few, s.merged) for s in found.slices] == [
        ("big", 100, False, 0),
        ("2 others", 5, True, 2),
    ]
    assert failure_slices([1] * 100 + [0] * 3, {"file": keys[:103]}, least=10).slices[-1].name == "x"

    text = found.text()
    assert text.splitlines()[-2].endswith("file 2 others, too few to tell")
    assert "!" not in text.splitlines()[-2]
    one = failure_slices([1] * 100 + [0] * 50, {"file": ["a"] * 100 + ["b"] * 50}).text(most=1, items="rows")
    assert one.splitlines()[1].startswith("  0.0000 !")
    assert one.splitlines()[-1] == "  1 more slices in the file"


def test_what_divides_nothing_is_not_printed() -> None:
    keys = {"file": ["a"] * 100, "kind": ["word"] * 60 + ["digits"] * 40}
    found = failure_slices([1] * 60 + [0] * 40, keys)
    assert {one.by for one in found.slices} == {"file", "kind"}
    assert "file" not in found.text()
    alone = failure_slices([1, 0] * 50, {"file": ["a"] * 100})
    assert alone.text(items="rows") == "agreement 0.5000; nothing divides its 100 rows"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        failure_slices([], {"file": []})
    with pytest.raises(ValueError, match=r"agrees=2\.0: every number"):
        failure_slices([2.0], {"file": ["a"]})
    with pytest.raises(ValueError, match=r"len\(file\)=2: needs one entry for each of the 1 items"):
        failure_slices([1.0], {"file": ["a", "b"]})
    with pytest.raises(ValueError, match="weights=0"):
        failure_slices([1.0], {"file": ["a"]}, weights=[0.0])
    with pytest.raises(ValueError, match="no table of slices"):
        FailureSlices.from_json({"slices": 3})


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(0, 10**6), min_size=1), st.integers(1, 50))
def test_every_length_lies_in_its_bucket(lengths: list[int], shortest: int) -> None:
    for length, name in zip(lengths, length_buckets(lengths, shortest), strict=True):
        if name.startswith("below"):
            assert length < shortest == int(name.split()[1])
        else:
            first, last = map(int, name.split(" to "))
            assert first <= length <= last == 2 * first - 1
            assert first % shortest == 0


def test_a_slice_of_one_row_tells_nothing_of_others() -> None:
    rows = np.repeat(np.arange(10), 100)
    agrees = (rows % 2).astype(float)  # whole rows are right or wrong
    found = failure_slices(agrees, {"file": [str(row) for row in rows]}, groups=rows)
    assert all(one.few for one in found.slices)
    pairs = failure_slices(agrees, {"kind": ["odd" if row % 2 else "even" for row in rows]}, groups=rows)
    assert not any(one.few for one in pairs.slices)
    # Five rows that agree as wholes say what five items do, and not what 500 do.
    odd = next(one for one in pairs.slices if one.name == "odd")
    assert odd.low < failure_slices([1.0] * 10, {"kind": ["a"] * 10}).average.low < 0.8

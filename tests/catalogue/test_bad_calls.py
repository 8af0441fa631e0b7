"""Every bad call of the catalogue: an error of ours that names the thing, before anything is compiled."""

import pathlib
import re

import pytest
from bad_calls import CALLS, Call

import elastic_lm as el


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{i} {case.name}") for i, case in enumerate(CALLS)])
def test_it_is_refused_by_name(case: Call, tmp_path: pathlib.Path) -> None:
    compiled = el.Sampler.compilations()
    with pytest.raises(case.error) as caught:
        case.call(tmp_path)
    message = str(caught.value)
    assert re.search(".*".join(map(re.escape, case.says.split(" … "))), message), message
    assert "\n" not in message.strip()
    assert el.Sampler.compilations() == compiled


def test_there_are_many() -> None:
    assert len(CALLS) >= 150

"""Commands that are killed or interrupted at random moments: `killing.py` with few of them."""

from pathlib import Path

import killing
import pytest


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "convert",
        "export",
        "cascade run",
        *(pytest.param(n, marks=pytest.mark.nightly) for n in ("train", "quickstart")),
    ],
)
def test_kills_lose_nothing_and_leave_nothing(tmp_path: Path, name: str) -> None:
    assert len(killing.run(tmp_path, {name: 2}, {}, seed=1)) == 1


@pytest.mark.long
@pytest.mark.parametrize("name", ["generate", "convert", "train"])
def test_ctrl_c_is_one_line_and_status_130(tmp_path: Path, name: str) -> None:
    assert len(killing.run(tmp_path, {}, {name: 2}, seed=1)) == 1


@pytest.mark.nightly
@pytest.mark.long
def test_the_death_of_one_of_two_processes_ends_the_other_and_loses_nothing(tmp_path: Path) -> None:
    assert "2 kills" in killing.run_together(tmp_path, 2, processes=2, seed=1)

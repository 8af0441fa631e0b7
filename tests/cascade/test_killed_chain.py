"""A cascade of three members that is killed beside its server: `killed_chain.py` with few records."""

from pathlib import Path

import killed_chain
import pytest


@pytest.mark.nightly
@pytest.mark.long
def test_a_killed_chain_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    folder.mkdir()
    told = killed_chain.run(folder, records=600, kills=3, steps=200)
    assert len(told["run"]["kills, the server and the lines that were there"]) == 3

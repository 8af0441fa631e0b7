"""Runs with one shape of model and batch compile once per session."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def compiled_programs_are_kept(programs_on_disk: None) -> None:
    """Kept for every test of this folder."""

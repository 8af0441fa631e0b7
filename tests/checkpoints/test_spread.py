"""Checkpoints of several processes, restored by other numbers of processes and devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_lm.checkpoints import position

SCRIPT = Path(__file__).parent / "spread_state.py"
SECONDS = 300.0  # for one group of processes; far above what it takes


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("", 0))
        return place.getsockname()[1]


def together(what: str, folder: Path, processes: int, devices: int) -> None:
    """Runs a group of processes, each with some simulated devices, to its good end."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    port = free_port() if processes > 1 else 0
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), what, str(folder), str(port), str(index), str(processes)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()


@pytest.mark.long
def test_saved_by_two_processes_and_restored_by_others(tmp_path: Path) -> None:
    together("save", tmp_path / "steps", processes=2, devices=2)
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["1", "2"]
    for processes, devices in ((1, 1), (1, 4), (1, 8), (4, 1)):
        together("restore", tmp_path / "steps", processes, devices)


class Batches:
    def __init__(self) -> None:
        self.state: Any = None

    def set_state(self, state: Any) -> None:
        self.state = state


def write(folder: Path, *texts: str) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"process_{i}_of_{len(texts)}.json").write_text(text)
    return folder


def test_positions_of_other_numbers_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = write(tmp_path / "same", '{"next": [3, 4]}', '{"next": [3, 4]}')
    assert position.read_position(same) == {"next": (3, 4)}

    shards = write(tmp_path / "shards", '{"shards": {"0": 5, "2": 6}}', '{"shards": {"1": 5, "3": 6}}')
    assert position.read_position(shards) == {"shards": {"0": 5, "1": 5, "2": 6, "3": 6}}

    own = write(tmp_path / "own", '{"next": 3}', '{"next": 4}')
    with pytest.raises(ValueError, match="by 2 processes that each had one of their own, and this run has 1"):
        position.read_position(own)
    at = SimpleNamespace(process_count=lambda: 2, process_index=lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(position, "jax", at)
        assert position.read_position(own) == {"next": 4}

    (own / "process_0_of_2.json").unlink()
    with pytest.raises(ValueError, match=r"process_0_of_2\.json is missing"):
        position.read_position(own)

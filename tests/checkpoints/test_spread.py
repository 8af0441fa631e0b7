"""Checkpoints of several processes, restored by other numbers of processes and devices."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import pytest
from many_processes import CHILD, together
from training_runs import changed

from elastic_lm.checkpoints import position
from elastic_lm.config.parse import to_dict
from elastic_lm.train.config import RunConfig
from elastic_lm.train.run import fit

SCRIPT = str(Path(__file__).parent / "spread_state.py")


def do(arguments: list[str], processes: int, devices: int) -> None:
    """Runs a group of processes, each with some simulated devices, to its good end."""
    for result in together([arguments] * processes, devices=devices, seconds=600):
        assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.long
def test_saved_by_two_processes_and_restored_by_others(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    do([SCRIPT, "save", str(folder)], processes=2, devices=2)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    for processes, devices in ((1, 1), (1, 4), (1, 8), (4, 1)):
        do([SCRIPT, "restore", str(folder)], processes, devices)


@pytest.mark.nightly
@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_of_two_processes_goes_on_in_one(run_config: RunConfig, tmp_path: Path, shards: int) -> None:
    config = changed(run_config, schedule="constant", eps=1e-3, eval_every=0, save_every=3)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=shards))
    _, straight, _ = fit(config, tmp_path / "straight")

    file, jobs = tmp_path / "half.json", tmp_path / "jobs.json"
    file.write_text(json.dumps(to_dict(changed(config, steps=3))))
    jobs.write_text(json.dumps([["train", [str(file), str(tmp_path / "moved")]]]))
    do([CHILD, str(jobs)], processes=2, devices=1)
    _, moved, _ = fit(config, tmp_path / "moved")
    chex.assert_trees_all_close(moved, straight, rtol=1e-5, atol=1e-5)


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

"""kill -9 of a training process, also inside a save: the rerun ends with bit-identical parameters."""

import random
import subprocess
import sys
import time
from pathlib import Path

import chex
import pytest

from elastic_lm.checkpoints.native import load_model

SCRIPT = Path(__file__).parent / "killed_run.py"
KILLS = 4
DEADLINE = 300.0  # seconds for everything; far above what it takes


def start(workdir: Path, text: Path, cache: Path) -> subprocess.Popen:
    workdir.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(workdir), str(text), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors.decode()[-2000:]


def announcement(workdir: Path) -> str | None:
    """The save that is on its way; the file goes when the save ends, also between two looks at it."""
    try:
        return (workdir / "saving").read_text()
    except FileNotFoundError:
        return None


def kill_inside_a_save(process: subprocess.Popen, workdir: Path, chance: random.Random) -> bool:
    """Kills once a save is on its way; False when the process ended before."""
    skip = chance.randrange(3)  # saves to let pass
    seen = None
    while process.poll() is None:
        saving = announcement(workdir)
        if saving and saving != seen:
            seen, skip = saving, skip - 1
            if skip < 0:
                time.sleep(chance.uniform(0.0, 0.05))
                break
        time.sleep(0.001)
    return kill(process)


def kill_between(process: subprocess.Popen, workdir: Path, chance: random.Random) -> bool:
    """Kills a moment after the first step of this process was written down."""
    before = (workdir / "metrics.jsonl").read_text() if (workdir / "metrics.jsonl").exists() else ""
    while process.poll() is None:
        file = workdir / "metrics.jsonl"
        if file.exists() and len(file.read_text()) > len(before):
            time.sleep(chance.uniform(0.0, 0.3))
            break
        time.sleep(0.005)
    return kill(process)


def kill(process: subprocess.Popen) -> bool:
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


@pytest.mark.long
def test_parameters_after_kills_are_bit_identical(text_file: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    cache = tmp_path / "cache"
    finish(start(tmp_path / "straight", text_file, cache))
    workdir = tmp_path / "killed"
    kills = []
    for attempt in range(KILLS):
        (workdir / "saving").unlink(missing_ok=True)
        process = start(workdir, text_file, cache)
        strike = kill_between if attempt % 3 == 2 else kill_inside_a_save
        if not strike(process, workdir, chance):
            break
        kills.append((workdir / "saving").exists())
    assert len(kills) >= 3, "the run ended before it was killed often enough"
    assert any(kills), "no kill hit a save"
    finish(start(workdir, text_file, cache))
    straight, killed = (load_model(tmp_path / name / "model")[1] for name in ("straight", "killed"))
    chex.assert_trees_all_equal(straight, killed)

"""SIGTERM to one of two training processes: both save the same step, end well, and go on bit-identically."""

import signal
import subprocess
from pathlib import Path

import chex
import killing
import pytest

import elastic_lm as el

STEPS = 1500
RECIPE = """
def get_config(arg=""):
    return {{
        "model": {{"vocab_size": 300, "d_model": 32, "n_layers": 1, "n_heads": 4, "d_mlp": 64,
                  "max_len": 16}},
        "data": {{"source": "text", "paths": ({text!r},), "seq_len": 16, "batch_size": 2, "span": 200}},
        "train": {{"steps": {steps}, "warmup": 2, "log_every": 300, "eval_every": 0, "save_every": 10000}},
    }}
"""


def start(folder: Path, workdir: str) -> list[subprocess.Popen]:
    arguments = ["--config", str(folder / "recipe.py"), "--workdir", str(folder / workdir)]
    return killing.start_together(2, arguments, folder / "programs", subprocess.PIPE)


def steps_saved(folder: Path) -> list[str]:
    return sorted((path.name for path in (folder / "checkpoints").iterdir()), key=int)


@pytest.mark.nightly
@pytest.mark.long
def test_all_processes_save_the_same_step_and_end_well(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE.format(text=str(text_file), steps=STEPS))
    for process in start(tmp_path, "straight"):
        killing.finish(process)

    first, second = start(tmp_path, "stopped")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    assert killing.wait(second, lambda: metrics.is_file() and metrics.stat().st_size > 0)
    second.send_signal(signal.SIGTERM)
    printed = [killing.finish(process) for process in (first, second)]
    (saved,) = steps_saved(tmp_path / "stopped")
    assert 0 < int(saved) < STEPS
    line = f"stopped after step {saved} of {STEPS}, which is saved; run it again to go on"
    assert line in printed[0].splitlines()[-1]
    assert not (tmp_path / "stopped" / "model").exists()

    for process in start(tmp_path, "stopped"):
        killing.finish(process)
    assert steps_saved(tmp_path / "stopped") == [saved, str(STEPS)]
    straight, stopped = (el.load(tmp_path / name / "model")[1] for name in ("straight", "stopped"))
    chex.assert_trees_all_equal(straight, stopped)

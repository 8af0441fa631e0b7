"""The scripts of docs/launch that need no cloud start two processes of this machine, which train together.

Stand-ins of `ssh` and `srun` on the path run their commands here.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "docs" / "launch"
SECONDS = 300  # that a script may take here

pytestmark = [
    pytest.mark.long,
    pytest.mark.nightly,
    pytest.mark.skipif(sys.platform == "win32", reason="there is no bash"),
]

# The last argument is the command; the host must be one of the names that the tests give.
SSH = """\
#!/bin/bash
command=${@: -1}
host=${@: -2:1}
[[ $host == node[12] ]] || exit 255
exec bash -c "$command"
"""

SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID=$JOB SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
export SLURM_STEP_TASKS_PER_NODE=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & jobs+=($!); done
trap 'kill -TERM "${jobs[@]}"' TERM
for job in "${jobs[@]}"; do
    wait "$job" || status=$?
    while kill -0 "$job" 2> /dev/null; do wait "$job" || status=$?; done
done
exit ${status:-0}
"""

RECIPE = """\
import elastic_lm as el


def get_config(arg=""):
    return el.RunConfig(
        model=el.ModelConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=2, d_mlp=64, max_len=32),
        data=el.DataConfig(source="text", paths=("text.txt",), seq_len=32, batch_size=4, span=200),
        train=el.TrainConfig(steps=6, warmup=1, log_every=1, eval_every=0, save_every=3),
    )
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """PATH with the stand-ins in front."""
    folder = tmp_path / "bin"
    folder.mkdir()
    own = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m elastic_lm "$@"\n'
    for name, text in {"ssh": SSH, "srun": SRUN, "elastic-lm": own}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def slurm_job() -> int:
    """A job number whose port, by JAX's rule, is free."""
    for job in range(os.getpid(), os.getpid() + 4096):
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", 65536 - 4096 + job % 4096))
            except OSError:
                continue
            return job
    raise AssertionError("no port is free")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run starts: a recipe and its text."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "text.txt").write_text("".join(f"line {i} says that {i} follows {i - 1}\n" for i in range(400)))
    return folder


def variables(path: str, script: str) -> dict[str, str]:
    own: Mapping[str, str] = {"JOB": str(slurm_job())}
    if script == "ssh.sh":
        port = free_port()
        own = {"HOSTS": "node1 node2", "COORDINATOR": f"127.0.0.1:{port}"}
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        **own,
    }


def step_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


@pytest.mark.parametrize("script", ["ssh.sh", "slurm.sh"])
def test_two_processes_train_together_as_one_does(script: str, path: str, folder: Path) -> None:
    environment = variables(path, script)
    flags = ["--config", "recipe.py", "--workdir", "run"]
    command = [LAUNCH / script, *flags]
    found = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=SECONDS
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert (folder / "run" / "model" / "elastic_config.json").is_file()
    (start,) = [json.loads(line) for line in (folder / "run" / "starts.jsonl").read_text().splitlines()]
    assert start["processes"] == 2
    assert found.stdout.count("goodput ") == 1  # the first process alone prints

    one = {**environment, "ELASTIC_LM_PROCESSES": "1"}
    alone = [sys.executable, "-m", "elastic_lm", "train", *flags[:2], "--workdir", "alone/run"]
    subprocess.run(alone, env=one, cwd=folder, check=True, capture_output=True, timeout=SECONDS)
    together, apart = step_lines(folder), step_lines(folder / "alone")
    assert [line["step"] for line in together] == [line["step"] for line in apart] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(together, apart, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)  # written with six digits


def test_ending_the_ssh_script_lets_all_processes_save(path: str, folder: Path) -> None:
    command = [LAUNCH / "ssh.sh", "--config", "recipe.py", "--workdir", "run"]
    command += ["--config.train.steps=100000", "--config.train.save_every=100000"]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=variables(path, "ssh.sh"),
            cwd=folder,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + SECONDS
            while "step 3/" not in log.read_text() and time.monotonic() < deadline:
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)  # what runs in the background ignores SIGINT
            assert process.wait(SECONDS) == 0, log.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert re.search(r"0: run: stopped after step \d+ of 100000, which is saved", log.read_text())
    (saved,) = [entry for entry in (folder / "run" / "checkpoints").iterdir() if entry.name.isdigit()]
    assert int(saved.name) >= 3

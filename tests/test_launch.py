"""The scripts of docs/launch: they parse, the page shows them, and they call what they say.

Stand-ins of `gcloud`, `docker` and `xpk` on the path note how they are called.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "docs" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no bash")

NOTE = """\
#!{python}
import json, os, sys
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
sys.exit({name!r} == "gcloud" and "describe" in sys.argv and not os.environ.get("IS_THERE"))
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """PATH with the stand-ins in front."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {name: NOTE.format(python=sys.executable, name=name) for name in ("gcloud", "docker", "xpk")}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def noted(script: str, path: str, folder: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """How the stand-ins were called, one after the other."""
    notes = folder / "notes"
    notes.unlink(missing_ok=True)
    environment = {**os.environ, "PATH": path, "NOTES": str(notes), **variables}
    subprocess.run([LAUNCH / script, *arguments], env=environment, check=True, timeout=60)
    return [json.loads(line) for line in notes.read_text().splitlines()]


FLAGS = ("--config", "ee_tuning:3,6", "--config.data.paths=('a b.txt',)", "--workdir", "gs://bucket/run")
PLACE = {"PROJECT": "mine", "ZONE": "us-west4-a"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_the_page_shows_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert f"```bash\n{text}```\n" in (ROOT / "docs" / "launch.md").read_text()


def test_the_image_is_shown() -> None:
    assert f"```text\n{(LAUNCH / 'Dockerfile').read_text()}```\n" in (ROOT / "docs" / "launch.md").read_text()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_slice.sh"])
def test_a_tpu_is_made_once_and_gets_the_command_as_it_was_typed(
    script: str, path: str, tmp_path: Path
) -> None:
    describe, create, install, train = noted(
        script, path, tmp_path, *FLAGS, **PLACE, TPU="t", TYPE="v5litepod-64"
    )
    for call, verb in ((describe, "describe"), (create, "create"), (install, "ssh"), (train, "ssh")):
        assert call[:8] == [
            "gcloud",
            "compute",
            "tpus",
            "tpu-vm",
            verb,
            "t",
            "--project=mine",
            "--zone=us-west4-a",
        ]
    assert create[8:] == ["--accelerator-type=v5litepod-64", "--version=v2-alpha-tpuv5-lite"]

    everywhere = ["--worker=all"] if script == "tpu_slice.sh" else []
    assert train[8:-1] == install[8:-1] == everywhere
    assert "elastic-lm[tpu" in install[-1]
    command = train[-1].removeprefix("--command=")
    assert shlex.split(command) == ["elastic/bin/elastic-lm", "train", *FLAGS]

    again = noted(script, path, tmp_path, *FLAGS, **PLACE, TPU="t", IS_THERE="1")
    assert [call[4] for call in again] == ["describe", "ssh", "ssh"]


def test_xpk_gets_an_image_and_the_command(path: str, tmp_path: Path) -> None:
    own = {**PLACE, "CLUSTER": "c", "IMAGE": "gcr.io/mine/elastic-lm:1", "SLICES": "2"}
    build, push, create = noted("gke_xpk.sh", path, tmp_path, *FLAGS, **own)
    assert build == ["docker", "build", "--tag", "gcr.io/mine/elastic-lm:1", str(LAUNCH)]
    assert push == ["docker", "push", "gcr.io/mine/elastic-lm:1"]
    assert create[:3] == ["xpk", "workload", "create"]
    flags = dict(flag.split("=", 1) for flag in create[3:])
    assert shlex.split(flags.pop("--command")) == ["elastic-lm", "train", *FLAGS]
    assert flags == {
        "--project": "mine",
        "--zone": "us-west4-a",
        "--cluster": "c",
        "--workload": "elastic-lm",
        "--tpu-type": "v5litepod-32",
        "--num-slices": "2",
        "--docker-image": "gcr.io/mine/elastic-lm:1",
        "--max-restarts": "20",
    }


@pytest.mark.parametrize("script", [s for s in SCRIPTS if ":?" in s.read_text()], ids=lambda path: path.name)
def test_what_is_missing_is_named(script: Path, path: str) -> None:
    bare = {name: value for name, value in os.environ.items() if name not in (*PLACE, "HOSTS")}
    found = subprocess.run([script], env={**bare, "PATH": path}, capture_output=True, text=True, timeout=60)
    assert found.returncode != 0
    assert re.search(r"(PROJECT|HOSTS): name ", found.stderr)

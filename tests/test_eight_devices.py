"""Runs the tests of meshes in a process with eight (pretended) CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).parent
NAMES = (
    "nn/test_placed_activations.py",
    "models/test_sharding.py",
    "models/test_encoder.py",
    "models/test_encoder_decoder.py",
    "decode/test_mesh.py",
    "width/test_slicing.py",
    "width/test_importance.py",
    "train/test_step.py",
    "train/test_mesh_run.py",
    "train/test_born_on_mesh.py",
    "train/test_sequence_mesh.py",
    "nn/test_attention_kernels.py",
)
FILES = tuple(TESTS / name for name in NAMES)


@pytest.mark.long
@pytest.mark.skipif(jax.device_count() >= 8, reason="this process has eight devices already")
def test_on_eight_devices() -> None:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-k", "mesh or sharding"]
    command += map(str, FILES)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout

"""Loading straight into shardings over several devices, and through `el.load` from a checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from hf_models import assert_same_model

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.models import sharding

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden" / "hf"

FOUR_DEVICES = """
import sys
import jax, numpy as np
from elastic_lm import hf, sharding

folder, out = sys.argv[1:]
mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
config, params = hf.load(folder, mesh=mesh)
kernel = params["layers_0"]["attn"]["qkv"]["kernel"]
wanted = sharding.param_shardings(config, mesh)["layers_0"]["attn"]["qkv"]["kernel"]
assert kernel.sharding == wanted, kernel.sharding
assert kernel.addressable_shards[0].data.size * 4 == kernel.size
hf.export(config, params, out)
"""


def test_parameters_land_in_their_shardings(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", FOUR_DEVICES, str(GOLDEN_FOLDER / "llama"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_model(hf.load(GOLDEN_FOLDER / "llama"), hf.load(tmp_path / "out"))


def test_a_mesh_of_one_changes_nothing() -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert_same_model(hf.load(GOLDEN_FOLDER / "gpt2", mesh=mesh), hf.load(GOLDEN_FOLDER / "gpt2"))


def test_el_load_reads_checkpoints_of_this_package(tmp_path: Path) -> None:
    config, params = hf.load(GOLDEN_FOLDER / "qwen2")
    checkpoint.save_model(tmp_path / "saved", config, params, None)
    model, again = el.load(tmp_path / "saved")
    assert_same_model((config, params), (model.config, again))
    model, half = el.load(tmp_path / "saved", dtype="bfloat16")
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
    np.testing.assert_array_equal(half["embed"]["table"], params["embed"]["table"].astype("bfloat16"))

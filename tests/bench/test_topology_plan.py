"""Plans of training runs for devices that are not there: against a compiler, a real run, and arithmetic."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.bench import topology_plan
from elastic_lm.checkpoints.describing import describe_model
from elastic_lm.cli import main as cli
from elastic_lm.config.data import DataConfig
from elastic_lm.config.mesh import MeshConfig
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.cost.counted import model_cost
from elastic_lm.cost.topologies import parse_topology
from elastic_lm.depth.ee_tuning import EETuningConfig
from elastic_lm.hf.config_json import config_to_hf
from elastic_lm.hf.published import PUBLISHED
from elastic_lm.testing import tiny_config
from elastic_lm.train.config import RunConfig, TrainConfig
from elastic_lm.width.elastic_training import ElasticTrainingConfig

MODEL = ModelConfig(
    vocab_size=32_000,
    d_model=4096,
    n_layers=2,
    n_heads=32,
    n_kv_heads=32,
    d_mlp=11_008,
    max_len=4096,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
HEAD, MLP, ATTENTION = 32_000 * 4096, 3 * 4096 * 11_008, 4 * 4096 * 4096


def tuning(mesh: MeshConfig = MeshConfig(data=1, fsdp=-1), **train: Any) -> RunConfig:  # noqa: B008
    """EE-Tuning of two layers of a Llama 2, with an exit after the first."""
    return RunConfig(
        exits=(ExitConfig(1, kind="mlp", init="copy"),),
        data=DataConfig(source="stdlib", seq_len=2048, batch_size=32),
        method=EETuningConfig(),
        train=TrainConfig(init_from="llama", **train),
        mesh=mesh,
    )


def planned(run: RunConfig, topology: str) -> topology_plan.TopologyPlan:
    return topology_plan.plan_training(run, parse_topology(topology), MODEL)


def test_parameters_of_published_shapes() -> None:
    """As their papers count them."""
    for name, count in (("llama-2-7b", 6.738e9), ("llama-2-13b", 13.016e9), ("llama-2-70b", 68.977e9)):
        config = describe_model(name)
        assert isinstance(config, ModelConfig)
        assert model_cost(config).parameters == pytest.approx(count, rel=1e-3)
    assert all(describe_model(name).param_dtype == "bfloat16" for name in PUBLISHED)


def test_bytes_of_graphics_cards_by_arithmetic() -> None:
    plan = planned(tuning(remat=True), "h100:8")
    assert plan.fits
    assert not plan.compiled
    assert plan.trained == HEAD + MLP + 4096
    # Norms are whole on every device.
    assert plan.held["trained parameters"] == 4 * (HEAD + MLP) // 8 + 4 * 4096
    assert plan.held["optimizer state"] == pytest.approx(2 * plan.held["trained parameters"], rel=1e-6)
    frozen = 2 * HEAD + 2 * (MLP + ATTENTION)
    assert plan.held["frozen parameters"] == pytest.approx(2 * frozen / 8, rel=1e-3)
    # One layer forward, and the exit forward twice and backward once, each product twice.
    tokens = 32 * 2048
    least = 2 * tokens * (ATTENTION + MLP + 4 * (HEAD + MLP) - MLP)
    assert least < plan.flops * 8 < 1.3 * least
    assert plan.roofline is not None
    assert plan.roofline.bound == "compute"


@pytest.mark.long
def test_what_does_not_fit_says_why_and_what_to_try() -> None:
    plan = planned(tuning(), "t4:1")
    assert not plan.fits
    assert plan.roofline is None
    assert "of the 15.20 GiB that a device has, most of it temporaries" in plan.because
    advice = " ".join(plan.advice)
    assert "train.remat=True" in advice
    assert 'train.mu_dtype="bfloat16"' in advice
    smaller = planned(tuning(remat=True), "t4:1")
    assert smaller.needed < plan.needed
    assert "train.remat=True" not in " ".join(smaller.advice)


@pytest.mark.long
def test_a_frozen_teacher_is_counted() -> None:
    method = ElasticTrainingConfig(menu=Menu(mlp=(0.5, 1.0), heads=(1.0,)), distil=0.5, teacher="frozen")
    run = RunConfig(
        data=DataConfig(source="stdlib", seq_len=32, batch_size=8),
        method=method,
        train=TrainConfig(init_from="x"),
    )
    without = dataclasses.replace(run, method=dataclasses.replace(method, teacher="live"))
    model, cards = tiny_config(), parse_topology("h100:8")
    plans = [topology_plan.plan_training(each, cards, model) for each in (run, without)]
    assert plans[0].held["frozen parameters"] == plans[1].held["trained parameters"]
    assert plans[1].held["frozen parameters"] == 0


@pytest.mark.long
def test_hosts_read_their_rows_and_write_their_parts() -> None:
    """Two machines of eight cards: a row is read once without a tensor axis, and a part written once."""
    plan = planned(tuning(), "h100:16").host
    assert (plan.hosts, plan.rows, plan.shared_rows) == (2, 16, 1)
    # Kernels and moments half and half; norms and the step, which every device holds, by the first.
    assert plan.checkpoint_bytes / 2 < plan.written_bytes < plan.checkpoint_bytes / 2 + 2**20
    assert plan.read_bytes == plan.written_bytes
    assert plan.restore_seconds == (plan.read_bytes + plan.model_bytes) / topology_plan.FOLDER_BANDWIDTH

    plan = planned(tuning(MeshConfig(data=1, fsdp=1, tensor=16)), "h100:16").host
    assert (plan.rows, plan.shared_rows) == (32, 2)

    plan = planned(tuning(MeshConfig(data=2, fsdp=8)), "h100:16").host
    assert plan.rows == 16
    assert plan.read_bytes == plan.checkpoint_bytes == plan.written_bytes


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a config.json, with overrides; and what it refuses."""
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(tiny_config(n_layers=4))))
    out = tmp_path / "plan.json"
    flags = ["plan", "--topology", "a100-40gb:2", "--config", "ee_tuning:1,2", "--json", str(out)]
    flags += ["--model", str(tmp_path / "config.json")]
    flags += ["--config.data.seq_len=32", "--config.data.batch_size=4"]
    assert cli.main(flags) == 0
    printed = capsys.readouterr().out
    assert "ee_tuning on a100-40gb:2: 2 devices of 1 host; mesh data 2, fsdp 1, tensor 1" in printed
    assert "fits: " in printed
    values = json.loads(out.read_text())
    assert values["fits"]
    assert (values["tokens"], values["host"]["rows"]) == (4 * 32, 4)

    for more, message in (
        (["--topology", "v9:4"], "topology='v9:4': must be one of"),
        (["--minutes", "3"], "--minutes 3.0: is not read with --topology"),
        (["--config.data.batch_size=3"], "data.batch_size=3: must be a multiple of 2"),
        (["--model", "llama-9"], "llama-9: no such model here; known shapes are smollm2-135m"),
    ):
        assert cli.main([*flags, *more]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["plan", "--config", "ee_tuning"]) == 2
    assert "name the devices too" in capsys.readouterr().err


REAL_RUN = """
import json, sys
import jax, numpy as np
import elastic_lm as el
from elastic_lm.bench.topology_plan import plan_training
from elastic_lm.cost.topologies import parse_topology
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import make_mesh, param_shardings, stacked_shardings
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.state import create_state, state_shardings
from elastic_lm.train.step import make_train_step, place_batch

model = el.ModelConfig(
    vocab_size=2048, d_model=128, n_layers=4, n_heads=8, n_kv_heads=4, d_mlp=512, max_len=128
)
run = el.RunConfig(
    model=model,
    data=el.DataConfig(source="stdlib", seq_len=64, batch_size=8),
    train=el.TrainConfig(loss_chunk=32),
    mesh=el.MeshConfig(data=2, fsdp=2, tensor=2),
)
plan = plan_training(run, parse_topology("cpu:8"))

mesh = make_mesh(2, 2, 2)
params = init_params(model, jax.random.key(0))
params = jax.device_put(el.train.stack_layers(params), stacked_shardings(param_shardings(model, mesh)))
method = el.train.Pretraining(model, loss_chunk=32)
trainable, frozen = method.split(params)
optimizer = make_optimizer(run.train)
places = state_shardings(optimizer, trainable)
state = create_state(optimizer, trainable)
del params, trainable
ids = np.ones((8, 64), np.int32)
batch = {"tokens": ids, "targets": ids, "positions": ids, "segments": ids, "weights": ids.astype(np.float32)}
batch = place_batch(batch, mesh)
step = make_train_step(method, optimizer, places)
compiled = step.lower(state, frozen, batch).compile()
state, metrics = compiled(state, frozen, batch)
jax.block_until_ready(state)
first = jax.devices()[0]
live = sum(
    shard.data.nbytes
    for array in jax.tree.leaves((state, frozen, batch))
    for shard in array.addressable_shards
    if shard.device == first
)
memory = compiled.memory_analysis()
print(json.dumps({
    "planned": plan.program,
    "held": plan.held,
    "live": live,
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "loss": float(metrics["loss"]),
}))
"""


@pytest.mark.long
def test_a_plan_is_what_a_real_run_on_eight_devices_takes() -> None:
    """Live arrays of the first device after a step, and the temporaries of the program that ran."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", REAL_RUN], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    planned = found["planned"]
    assert planned["arguments"] == found["arguments"] == sum(found["held"].values())
    assert planned["arguments"] == pytest.approx(found["live"], rel=0.01)
    taken = found["live"] + found["temporaries"]
    assert planned["total"] - planned["code"] == pytest.approx(taken, rel=0.1)
    assert 0 < found["loss"] < 20

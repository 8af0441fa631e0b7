"""Columns of rows divided over devices: every method computes what it does on one device."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import changed

from elastic_lm.config.mesh import MeshConfig
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.config.task import TaskConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.ee_tuning import EETuning, JointTraining
from elastic_lm.depth.sorted_finetuning import SortedFineTuning
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import column_sharding, make_mesh, param_shardings, stacked_shardings
from elastic_lm.nn import attention, sequence
from elastic_lm.testing import tiny_config
from elastic_lm.train.config import RunConfig, TaskRun, TrainConfig
from elastic_lm.train.method import Method
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.pretraining import Pretraining
from elastic_lm.train.run import fit
from elastic_lm.train.state import create_state, state_shardings
from elastic_lm.train.step import make_eval_step, make_train_step, place_batch
from elastic_lm.width.elastic_training import ElasticTraining

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
ROWS, LENGTH, STEPS = 4, 24, 2
# A large eps keeps AdamW from turning rounding of tiny gradients into whole steps.
TRAIN = TrainConfig(steps=10, lr=1e-2, warmup=0, schedule="constant", eps=1e-3)
PLAIN = tiny_config(n_layers=2)
EXITS = PLAIN.with_exits((ExitConfig(1, kind="block"),))
ELASTIC = tiny_config(n_layers=2, elastic_groups=8)
METHODS = {
    "pretraining": Pretraining(PLAIN, loss_chunk=8),
    "pretraining, remat": Pretraining(PLAIN, loss_chunk=5, remat="dots_no_batch"),
    "ee_tuning": EETuning(EXITS, loss_chunk=8),
    "joint": JointTraining(EXITS, loss_chunk=10),
    "sorted_finetuning": SortedFineTuning(EXITS, loss_chunk=8),
    "flextron": ElasticTraining(ELASTIC, menu=Menu((0.5, 1.0), (1.0,), (0.5, 1.0)), distil=0.5, loss_chunk=8),
}


def host_batch(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Two documents per row, and rows that count more and more targets."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (ROWS, LENGTH + 1), dtype=np.int32)
    counted = LENGTH - 5 * np.arange(ROWS)[:, None]
    places, cut = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)), 7
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (places < counted).astype(np.float32),
        "positions": np.where(places < cut, places, places - cut),
        "segments": np.where(places < cut, 1, 2).astype(np.int32),
    }


def train(method: Method[Any], mesh: Any, accumulate: int = 1) -> Any:
    """Parameters after some steps, their metrics, and those of an evaluation."""
    config = method.config
    shardings = stacked_shardings(param_shardings(config, mesh))
    params = init_params(config, jax.random.key(0), shardings=shardings, stacked=True)
    trainable, frozen = method.split(params)
    optimizer = make_optimizer(TRAIN)
    state = create_state(optimizer, trainable)
    step = make_train_step(method, optimizer, state_shardings(optimizer, trainable), accumulate)
    metrics = {}
    for i in range(STEPS):
        state, metrics = step(state, frozen, place_batch(host_batch(config, i), mesh))
    last = place_batch(host_batch(config, 99), mesh)
    evaluated = make_eval_step(method.for_evaluation(), mesh)(state.params, frozen, last)
    return jax.device_get((state.params, metrics, evaluated))


@eight
@pytest.mark.parametrize(
    ("name", "long"), [*((name, False) for name in METHODS), ("pretraining", True), ("flextron", True)]
)
def test_every_method_on_a_sequence_mesh_equals_one_device(
    name: str, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if long:  # queries in chunks, some of every device's in each
        monkeypatch.setattr(attention, "LONG", 4)
        monkeypatch.setattr(attention, "CHUNK", 4)
    expected = train(METHODS[name], make_mesh(devices=jax.devices()[:1]))
    found = train(METHODS[name], make_mesh(2, 1, 2, sequence=2), accumulate=2 if name == "ee_tuning" else 1)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@eight
def test_memory_of_a_step_on_a_sequence_mesh_falls_with_the_devices() -> None:
    config = tiny_config(n_layers=2, d_model=64, d_mlp=256)
    method = Pretraining(config, remat="dots_no_batch", loss_chunk=64)

    def temporaries(devices: int) -> int:
        mesh = make_mesh(1, 1, 1, jax.devices()[:devices], sequence=devices)
        shardings = stacked_shardings(param_shardings(config, mesh))
        params = init_params(config, jax.random.key(0), shardings=shardings, stacked=True)
        optimizer = make_optimizer(TRAIN)
        state = create_state(optimizer, params)
        step = make_train_step(method, optimizer, state_shardings(optimizer, params))
        shape = functools.partial(jax.ShapeDtypeStruct, (1, 4096), sharding=column_sharding(mesh))
        ints, floats = shape(jnp.int32), shape(jnp.float32)
        batch = Batch(ints, ints, floats, ints, ints)
        program: Any = step
        return program.lower(state, {}, batch).compile().memory_analysis().temp_size_in_bytes

    one, four = temporaries(1), temporaries(4)
    assert four < 0.4 * one, (one, four)


@eight
def test_a_run_on_a_sequence_mesh(run_config: RunConfig, tmp_path: Path) -> None:
    config = changed(run_config, schedule="constant", eps=1e-3, steps=3, eval_every=3)
    _, one, expected = fit(dataclasses.replace(config, mesh=MeshConfig(data=8)), tmp_path / "rows")
    mesh = MeshConfig(data=2, sequence=-1)
    _, many, found = fit(dataclasses.replace(config, mesh=mesh), tmp_path / "columns")
    chex.assert_trees_all_close(jax.device_get(many), jax.device_get(one), rtol=1e-4, atol=1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@eight
def test_columns_that_a_mesh_cannot_divide_are_refused(run_config: RunConfig, tmp_path: Path) -> None:
    data = dataclasses.replace(run_config.data, seq_len=30)
    config = dataclasses.replace(run_config, data=data, mesh=MeshConfig(data=2, sequence=4))
    with pytest.raises(ValueError, match=r"data\.seq_len=30: must be a multiple of mesh\.sequence=4"):
        fit(config, tmp_path)


def test_records_are_not_divided_by_a_sequence_mesh() -> None:
    with pytest.raises(ValueError, match=r"mesh\.sequence=2: records are padded"):
        TaskRun(
            task=TaskConfig(paths=("train.jsonl",)),
            train=TrainConfig(init_from="model"),
            mesh=MeshConfig(sequence=2),
        )


def test_pieces_are_joined_again() -> None:
    x = jnp.arange(2 * 12 * 3).reshape(2, 12, 3)
    for chunk in (4, 5, 12, 16):
        pieces = sequence.pieces(x, chunk)
        assert pieces.shape == (-(-12 // chunk), 2, chunk, 3)
        chex.assert_trees_all_equal(sequence.joined(pieces, 12), x)

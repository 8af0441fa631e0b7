"""Parameters are born, loaded and stacked in their shardings: no device ever holds the whole model."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import chex
import jax
import numpy as np
import pytest
from training_runs import changed

from elastic_lm import hf
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.model import ExitConfig
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.hf import loading
from elastic_lm.models.decoder import stack_layers
from elastic_lm.models.exits import attach_exits
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import make_mesh, param_shardings, stack_onto, stacked_shardings
from elastic_lm.testing import random_params, tiny_config
from elastic_lm.train.config import RunConfig
from elastic_lm.train.text import prepare_text

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
CONFIG = tiny_config(n_layers=12, vocab_size=512, exits=(2,))  # layers_10 comes before layers_2 in the tree


def on_first_device() -> int:
    """Bytes of all arrays that the first device holds."""
    first = jax.devices()[0]
    shards = itertools.chain.from_iterable(array.addressable_shards for array in jax.live_arrays())
    own = [shard.data for shard in shards if shard.device == first]
    # A shard that was looked at is an array too, in the same place.
    return sum({data.unsafe_buffer_pointer(): data.nbytes for data in own if data.size}.values())


def size_of(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """[the most that the first device has held more than before], looked at after every program."""
    before, most, jit = on_first_device(), [0], jax.jit

    def looking(*args: Any, **options: Any) -> Any:
        compiled = jit(*args, **options)

        def call(*given: Any, **named: Any) -> Any:
            result = compiled(*given, **named)
            most[0] = max(most[0], on_first_device() - before)
            return result

        return call

    with mock.patch.object(jax, "jit", looking):
        yield most


def test_stacked_draws_are_those_of_single_layers() -> None:
    key = jax.random.key(3)
    born = init_params(CONFIG, key, stacked=True)
    chex.assert_trees_all_equal(born, stack_layers(init_params(CONFIG, key)))


@pytest.mark.parametrize("partitionable", [True, False])
@eight
def test_draws_on_a_mesh_are_those_of_one_device(partitionable: bool) -> None:
    key, mesh = jax.random.key(3), make_mesh(2, 2, 2)
    shardings = param_shardings(CONFIG, mesh)
    with jax.threefry_partitionable(partitionable):
        expected = jax.device_get(init_params(CONFIG, key))
        canonical = init_params(CONFIG, key, shardings=shardings)
        stacked = init_params(CONFIG, key, shardings=stacked_shardings(shardings), stacked=True)
    chex.assert_trees_all_equal(jax.device_get(canonical), expected)
    chex.assert_trees_all_equal(jax.device_get(stacked), jax.device_get(stack_layers(expected)))
    found = jax.tree.map(lambda leaf: leaf.sharding, stacked)
    assert found == stacked_shardings(shardings)


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_mlp=64),
        EncoderDecoderConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_mlp=64),
    ],
)
@eight
def test_other_models_are_born_on_a_mesh(config: Any) -> None:
    shardings = param_shardings(config, make_mesh(2, 2, 2))
    born = init_params(config, jax.random.key(0), shardings=shardings)
    chex.assert_trees_all_equal(jax.device_get(born), jax.device_get(init_params(config, jax.random.key(0))))
    assert jax.tree.map(lambda leaf: leaf.sharding, born) == shardings


@eight
def test_stacking_on_a_mesh_holds_one_model() -> None:
    shardings = param_shardings(CONFIG, make_mesh(1, 4, 2))
    host = jax.device_get(random_params(CONFIG))
    with watched() as most:
        placed = jax.device_put(host, shardings)
        stacked = stack_onto(placed, stacked_shardings(shardings))
    chex.assert_trees_all_equal(jax.device_get(stacked), jax.device_get(stack_layers(host)))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(host["layers_0"])) * CONFIG.n_layers
    part = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(stacked))
    assert part < 0.2 * size_of(host)
    assert part <= most[0] <= part + largest / 8


@eight
def test_a_new_run_on_a_mesh_never_holds_a_model_on_one_device(run_config: RunConfig, tmp_path: Path) -> None:
    assert run_config.model is not None
    model = dataclasses.replace(run_config.model, n_layers=6, tied=False, d_mlp=128)
    exits = (ExitConfig(2, kind="mlp", init="random"), ExitConfig(4, kind="block"))
    config = dataclasses.replace(changed(run_config, method="joint"), model=model, exits=exits)
    with watched() as most:
        run = prepare_text(config, tmp_path, make_mesh(1, 4, 2))  # the tokenizer is learned from text

    key = jax.random.key(config.train.seed or 0)
    found = dataclasses.replace(model, bos_id=run.tokenizer.bos_id, eos_ids=run.tokenizer.eos_ids)
    _, expected = attach_exits(found, init_params(found, key), exits, jax.random.fold_in(key, 1))
    chex.assert_trees_all_equal(jax.device_get(run.params), jax.device_get(stack_layers(expected)))
    assert (
        0.1 * size_of(expected) < most[0] < 0.25 * size_of(expected)
    )  # an eighth of what is split, and norms


@eight
def test_a_hugging_face_folder_lands_on_a_mesh_tensor_by_tensor(
    run_config: RunConfig, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device 0 never holds more than its part and no tensor whole, from the file to the first step."""
    assert run_config.model is not None
    model = dataclasses.replace(run_config.model, n_layers=6)
    params = random_params(model)
    hf.export(model, params, tmp_path / "hf", train_bpe([text_file.read_text()], model.vocab_size))
    host = jax.device_get(params)
    del params
    before, seen = on_first_device(), []

    def looking(*given: Any) -> np.ndarray:
        seen.append(on_first_device() - before)
        return cast_tensor(*given)

    cast_tensor = loading.cast_tensor
    monkeypatch.setattr(loading, "cast_tensor", looking)
    config = changed(run_config, init_from=str(tmp_path / "hf"))
    run = prepare_text(dataclasses.replace(config, model=None), tmp_path, make_mesh(1, 4, 2))
    seen.append(on_first_device() - before)
    chex.assert_trees_all_equal(jax.device_get(run.params), jax.device_get(stack_layers(host)))
    assert len(seen) > len(jax.tree.leaves(host))
    assert max(seen) < 0.2 * size_of(host)

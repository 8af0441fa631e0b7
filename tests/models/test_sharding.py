"""Meshes and rules: what fits, what is refused, and restoring onto another mesh."""

import dataclasses
import itertools

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from elastic_lm.checkpoints.native import load_model, save_model
from elastic_lm.config.model import ExitConfig
from elastic_lm.models.decoder import Decoder, default_positions, stack_layers
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import (
    Rules,
    arranged,
    batch_sharding,
    make_mesh,
    param_shardings,
    replicated,
    stacked_shardings,
)
from elastic_lm.testing import tiny_config

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def test_one_device_is_a_mesh_of_one() -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@eight
def test_minus_one_takes_what_is_left() -> None:
    assert dict(make_mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


@eight
@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (16, 1, 1), (-1, 16, 1), (0, 8, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(*sizes)


def test_rules_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="'heds' has no rule"):
        Rules().spec(("heds", "embed"))
    with pytest.raises(ValueError, match="used twice"):
        Rules(embed="tensor").spec(("mlp", "embed"))
    with pytest.raises(ValueError, match=r"rules.mlp='model'"):
        Rules(mlp="model")
    assert Rules().spec(("mlp", None, "embed")) == PartitionSpec("tensor", None, "fsdp")


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the arrangement of a mesh reads of a TPU."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def chips(width: int, height: int, slices: int = 1) -> list[Chip]:
    """Slices of width times height chips, in no order that helps."""
    places = [(s, x, y) for s in range(slices) for y in range(height) for x in range(width)]
    found = [Chip(i, (x, y, 0), s, process_index=s) for i, (s, x, y) in enumerate(places)]
    return sorted(found, key=lambda chip: (chip.id * 7) % len(found))


def distance(one: Chip, other: Chip) -> int:
    return sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True))


@pytest.mark.parametrize("sizes", [(1, 4, 4), (4, 1, 4), (16, 1, 1), (2, 2, 4)])
def test_neighbours_of_a_mesh_axis_are_neighbours_in_hardware(sizes: tuple[int, int, int]) -> None:
    found = arranged(chips(4, 4), sizes)
    assert found.shape == sizes
    assert {chip.id for chip in found.flat} == set(range(16))
    for row in found.reshape(-1, sizes[-1]):
        assert all(distance(one, other) == 1 for one, other in itertools.pairwise(row))


def test_a_mesh_axis_may_be_a_part_of_an_axis_of_hardware() -> None:
    found = arranged(chips(4, 8), (1, 16, 2))
    assert {chip.id for chip in found.flat} == set(range(32))


@pytest.mark.parametrize("sizes", [(2, 4, 4), (1, 8, 4), (4, 2, 2, 2)])
def test_slices_of_a_mesh_differ_in_rows_alone(sizes: tuple[int, ...]) -> None:
    found = arranged(chips(4, 4, slices=2), sizes)
    assert {chip.id for chip in found.flat} == set(range(32))
    for row in found.reshape(sizes[0] * sizes[1], -1):
        assert len({chip.slice_index for chip in row}) == 1
    with pytest.raises(ValueError, match=r"mesh=\(1, 1, 32\): 2 slices are joined by a network"):
        arranged(chips(4, 4, slices=2), (1, 1, 32))


@eight
def test_a_vocabulary_that_a_mesh_cannot_divide_lies_whole_with_a_warning() -> None:
    config = tiny_config(vocab_size=65, tied=False)
    with pytest.warns(UserWarning, match=r"embed.table \(65, 32\): 65 rows cannot be split over tensor=2"):
        shardings = param_shardings(config, make_mesh(2, 2, 2))
    assert shardings["embed"]["table"].spec == PartitionSpec(None, "fsdp")
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 65, (4, 9))
    logits = jax.jit(Decoder(config).apply)({"params": params}, tokens).logits
    divided = jax.jit(Decoder(config).apply)({"params": jax.device_put(params, shardings)}, tokens).logits
    np.testing.assert_allclose(divided, logits, rtol=1e-5, atol=1e-5)


@eight
def test_every_parameter_gets_its_part() -> None:
    config = tiny_config(exits=(2,), qkv_bias=True)
    shardings = param_shardings(config, make_mesh(2, 2, 2))
    placed = jax.device_put(init_params(config, jax.random.key(0)), shardings)
    kernel = placed["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (2, 64, 32)
    assert kernel.addressable_shards[0].data.shape == (2, 32, 16)
    assert placed["exit_2"]["head"]["kernel"].addressable_shards[0].data.shape == (32, 16)


@eight
def test_stacked_form_keeps_the_layer_dimension_whole() -> None:
    config = tiny_config()
    mesh = make_mesh(1, 4, 2)
    shardings = stacked_shardings(param_shardings(config, mesh))
    placed = jax.device_put(stack_layers(init_params(config, jax.random.key(0))), shardings)
    assert placed["layers"]["attn"]["qkv"]["kernel"].addressable_shards[0].data.shape == (4, 1, 4, 8, 8)


@eight
def test_a_dimension_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attn.qkv.kernel .*: 2 cannot be split over tensor=4"):
        param_shardings(tiny_config(), make_mesh(2, 1, 4))


@eight
def test_tensor_parallel_layers_gather_no_kernel() -> None:
    config = tiny_config(n_layers=1)
    mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
    params = jax.device_put(init_params(config, jax.random.key(0)), param_shardings(config, mesh))
    for length in (1, 8, 64):  # every form of the linear map
        hidden = jax.device_put(np.ones((1, length, config.d_model), np.float32), replicated(mesh))

        def layers(params, hidden):
            decoder = Decoder(config).bind({"params": params})
            tap, _ = decoder.run_layers(hidden, default_positions(hidden, None), 0, 1)
            return tap.hidden

        program = jax.jit(layers).lower(params, hidden).compile().as_text()
        assert "all-reduce" in program
        assert "all-gather" not in program


@eight
def test_rows_are_spread_over_data_and_fsdp() -> None:
    rows = jax.device_put(np.zeros((8, 3)), batch_sharding(make_mesh(2, 2, 2)))
    assert rows.addressable_shards[0].data.shape == (2, 3)


@eight
def test_a_model_loads_onto_any_mesh(tmp_path) -> None:
    config = tiny_config().with_exits((ExitConfig(2, "mlp"),))
    params = init_params(config, jax.random.key(0))
    save_model(tmp_path, config, jax.device_put(params, param_shardings(config, make_mesh(1, 4, 2))), None)
    mesh = make_mesh(4, 2, 1)
    _, loaded = load_model(tmp_path, mesh)
    chex.assert_trees_all_equal(jax.device_get(loaded), jax.device_get(params))
    chex.assert_trees_all_equal(jax.tree.map(lambda p: p.sharding, loaded), param_shardings(config, mesh))

"""NaN and infinity in weights are refused by name, whatever the dtype and the kind of folder."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import elastic_lm as el
from elastic_lm.checkpoints.native import load_model, save_model
from elastic_lm.models import finite
from elastic_lm.models.finite import (
    PIECE,
    NotFiniteError,
    cast_tensor,
    check_finite,
    check_tensor,
    first_not_finite,
    is_finite,
    overflow_error,
)
from elastic_lm.testing import random_params, tiny_config

GOLDEN = Path(__file__).parents[1] / "golden" / "hf" / "llama"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_is_found_wherever_it_lies(dtype, bad) -> None:
    values = np.full(PIECE + 3, jnp.finfo(dtype).max, dtype)
    assert is_finite(values)
    for place in (0, PIECE - 1, PIECE, PIECE + 2):
        damaged = values.copy()
        damaged[place] = bad
        assert not is_finite(damaged)


def test_shapes_of_any_kind() -> None:
    assert is_finite(np.zeros((0, 3), np.float16))
    assert not is_finite(np.asarray(np.nan, jnp.bfloat16))
    strided = np.asarray([[1, np.nan], [1, np.nan]], jnp.bfloat16)
    assert is_finite(strided[:, 0])
    assert not is_finite(strided.T[1])


def test_messages_name_the_value_and_its_place() -> None:
    values = np.ones((2, 3), np.float32)
    values[1, 2] = -np.inf
    with pytest.raises(NotFiniteError, match=r"w\.st: tensor 'a' holds infinity at \[1, 2\] \(1 of 6 "):
        check_tensor("w.st: tensor 'a'", values)


def test_devices_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    get = jax.device_get
    monkeypatch.setattr(finite, "_on_host", lambda leaf: isinstance(leaf, np.ndarray))
    monkeypatch.setattr(finite.jax, "device_get", lambda tree: [waits.append(len(tree)), *get(tree)][1:])
    params = {"a": np.ones(2), "b": jnp.ones(2), "c": jnp.ones(3, jnp.int32), "d": jnp.asarray([1, jnp.nan])}
    found = first_not_finite(params)
    assert found is not None
    assert (found[0], waits) == ("d", [2])
    assert first_not_finite({**params, "d": jnp.ones(2)}) is None
    found = first_not_finite({**params, "a": np.asarray([np.inf])})
    assert found is not None
    assert found[0] == "a"


def test_an_export_of_bad_weights_says_so(tmp_path: Path) -> None:
    config = tiny_config()
    params = random_params(config)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(jnp.nan)
    with pytest.raises(NotFiniteError, match=r"that is exported: parameter final_norm/scale holds NaN"):
        el.hf.export(config, params, tmp_path / "hf")
    assert not [*tmp_path.iterdir()]


def test_a_value_that_float16_cannot_hold() -> None:
    values = np.asarray([1.0, 1e5], np.float32)
    with pytest.raises(NotFiniteError, match=r"values up to 100000, .* float16 is 65504: .*'bfloat16'"):
        cast_tensor("x", values, np.float16)
    assert is_finite(cast_tensor("x", values, jnp.bfloat16))
    assert cast_tensor("x", values, np.float32) is values


def test_trees_of_parameters() -> None:
    params = random_params(tiny_config())
    assert first_not_finite(params) is None
    check_finite("folder", params)
    params["layers_2"]["mlp"]["down"]["kernel"] = jnp.full((32, 64), jnp.nan, jnp.bfloat16)
    with pytest.raises(NotFiniteError, match=r"folder: parameter layers_2/mlp/down/kernel holds NaN at"):
        check_finite("folder", params)
    assert "layers_2/mlp/down/kernel" in str(overflow_error("logits", params, "float32"))
    whole = jax.tree.map(jnp.nan_to_num, params)
    assert "float16, 65504; load the model with dtype 'bfloat16'" in str(
        overflow_error("x", whole, "float16")
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_hugging_face_folder(tmp_path: Path, dtype, bad) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "model"))
    weights = {name: values.astype(dtype) for name, values in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    el.load(folder)

    weights[QUERY][3, 1] = bad
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{QUERY}' holds .* at \[3, 1\]"):
        el.load(folder)


def test_a_hugging_face_folder_that_float16_cannot_hold(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights[QUERY][3, 1] = -1e6
    save_file(weights, folder / "model.safetensors")
    el.load(folder, dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"{QUERY}.*values up to 1e\+06, .* float16"):
        el.load(folder, dtype="float16")


def test_a_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(exits=(2,), n_layers=3)
    params = random_params(config)
    params["exit_2"]["norm"]["scale"] = params["exit_2"]["norm"]["scale"].at[4].set(1e6)
    save_model(tmp_path / "large", config, params, None)
    el.load(tmp_path / "large", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"large/params as float16: parameter exit_2/norm/scale holds inf"):
        el.load(tmp_path / "large", dtype="float16")

    params["exit_2"]["norm"]["scale"] = params["exit_2"]["norm"]["scale"].at[4].set(jnp.inf)
    save_model(tmp_path / "bad", config, params, None)
    with pytest.raises(ValueError, match=r"params: parameter exit_2/norm/scale holds infinity at \[4\]"):
        load_model(tmp_path / "bad")

"""Models of any shape come back from disk bit by bit, as checkpoints and as Hugging Face folders."""

import functools
import pathlib
import tempfile
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm import hf
from elastic_lm.checkpoints.native import load_menu, load_model, save_model
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.config.rope import RopeConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.testing import assert_same_tree, random_params, tiny_config

properties = functools.partial(settings, derandomize=True, deadline=None)
kinds = st.sampled_from(["embedding", "norm", "linear", "mlp", "block"])


@st.composite
def exits(draw: st.DrawFn, n_layers: int) -> tuple[ExitConfig, ...]:
    layers = sorted(draw(st.sets(st.integers(1, n_layers), max_size=2)))
    return tuple(
        ExitConfig(layer, draw(kinds), tied=draw(st.booleans()), gate=draw(st.sampled_from([0, 4])))
        for layer in layers
    )


@st.composite
def models(draw: st.DrawFn, **fixed: Any) -> ModelConfig:
    """Small models; `fixed` fields are as given."""
    n_layers, kv_heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    fields = {
        "n_layers": n_layers,
        "n_kv_heads": kv_heads,
        "d_model": draw(st.sampled_from([8, 16])),
        "d_mlp": draw(st.integers(1, 24)),
        "vocab_size": draw(st.integers(1, 40)),
        "head_dim": draw(st.sampled_from([2, 8])),
        "tied": draw(st.booleans()),
        "param_dtype": draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        "rope": RopeConfig(theta=draw(st.floats(1.0, 1e6)), fraction=1.0),
        "norm_eps": draw(st.floats(0.0, 1e-3)),
        "eos_ids": tuple(draw(st.sets(st.integers(0, 9), max_size=3))),
    }
    return tiny_config(**{**fields, **fixed}).with_exits(draw(exits(n_layers)))


free = {
    "gated": st.booleans(),
    "qk_norm": st.booleans(),
    "qkv_bias": st.booleans(),
    "parallel_residual": st.booleans(),
    "norm": st.sampled_from(["rmsnorm", "layernorm"]),
    "position": st.sampled_from(["rope", "learned"]),
}


@properties(max_examples=6)
@given(st.fixed_dictionaries(free).flatmap(lambda fields: models(**fields)), st.booleans())
def test_a_checkpoint_holds_the_model(config: ModelConfig, elastic: bool) -> None:
    params = random_params(config)
    menu = Menu(mlp=(0.5, 1.0), heads=(1.0,)) if elastic else None
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        save_model(path, config, params, None, menu=menu)
        found, back = load_model(path)
        assert found == config
        assert_same_tree(back, params)
        assert {leaf.name for leaf in path.parent.iterdir()} == {"model"}
        assert menu is None or load_menu(path) == menu


@properties(max_examples=10)
@given(models())
def test_a_hugging_face_folder_holds_the_model(config: ModelConfig) -> None:
    params = random_params(config)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        hf.export(config, params, path)
        found, back = hf.load(path, dtype=config.param_dtype)
        assert to_dict(found) | {"dtype": config.dtype} == to_dict(config)
        assert_same_tree(back, params)


@properties(max_examples=60)
@given(st.fixed_dictionaries(free).flatmap(lambda fields: models(**fields)))
def test_a_config_holds_itself(config: ModelConfig) -> None:
    assert from_dict(ModelConfig, to_dict(config)) == config

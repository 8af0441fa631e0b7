"""Every family against logits that transformers computed once; needs neither torch nor transformers."""

from pathlib import Path

import numpy as np
import pytest
from hf_models import TOLERANCE, assert_same_model, our_logits, relative_error

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.config.model import ModelConfig

FOLDER = Path(__file__).parents[1] / "golden" / "hf"


DECODERS = sorted(name for name, family in hf.FAMILIES.items() if family.config_class is ModelConfig)


def test_there_is_a_golden_checkpoint_for_every_family_of_decoders() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == DECODERS


@pytest.mark.parametrize("model_type", DECODERS)
def test_logits_are_those_of_transformers_and_survive_export(model_type: str, tmp_path: Path) -> None:
    expected = np.load(FOLDER / model_type / "expected.npz")
    config, params = hf.load(FOLDER / model_type)
    ours = our_logits(config, params, expected["tokens"])
    assert relative_error(ours, expected["logits"]) < TOLERANCE
    hf.export(config, params, tmp_path / "out")
    assert_same_model((config, params), hf.load(tmp_path / "out"))


def test_el_load_gives_a_decoder() -> None:
    model, params = el.load(FOLDER / "llama")
    expected = np.load(FOLDER / "llama" / "expected.npz")
    logits = model.bind({"params": params})(expected["tokens"]).logits
    assert relative_error(np.asarray(logits), expected["logits"]) < TOLERANCE
    assert model.config.eos_ids == (3, 5)
    assert model.config.bos_id == 1


def test_half_precision_is_the_rounded_checkpoint() -> None:
    _, exact = hf.load(FOLDER / "qwen2")
    for dtype in ("bfloat16", "float16"):
        config, params = hf.load(FOLDER / "qwen2", dtype=dtype)
        assert (config.dtype, config.param_dtype) == (dtype, dtype)
        kernel = params["layers_0"]["attn"]["qkv"]["kernel"]
        assert kernel.dtype == dtype
        np.testing.assert_array_equal(kernel, exact["layers_0"]["attn"]["qkv"]["kernel"].astype(dtype))

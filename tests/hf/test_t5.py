"""T5 and T5 1.1: parity with transformers, both directions, and refusals."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import TOLERANCE, assert_same_model, relative_error
from safetensors.numpy import load_file, save_file
from t5_models import FOLDER, GOLDEN, VARIANTS, our_logits, random_pair, random_t5, their_logits

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.models.encoder_decoder import attach_encoder_head
from elastic_lm.nn.relative_position import relative_buckets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden T5 to change."""
    return Path(shutil.copytree(FOLDER / "t5", tmp_path / "model"))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    path.unlink()
    save_file(weights, path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_logits_and_export(name: str, tmp_path: Path) -> None:
    expected = dict(np.load(FOLDER / name / "expected.npz"))
    config, params = hf.load(FOLDER / name)
    assert relative_error(our_logits(config, params, expected), expected["logits"]) < TOLERANCE
    hf.export(config, params, tmp_path / "out")
    assert_same_model((config, params), hf.load(tmp_path / "out"))


def test_el_load_and_elastic_checkpoints(tmp_path: Path) -> None:
    model, params = el.load(FOLDER / "t5_1_1")
    assert isinstance(model, el.EncoderDecoder)
    assert (model.config.tied, model.config.scaled_head, model.config.gated) == (False, False, True)
    config, params = attach_encoder_head(model.config, params, 3, jax.random.key(0))
    checkpoint.save_model(tmp_path / "saved", config, params, None)
    again, same = el.load(tmp_path / "saved")
    assert_same_model((config, params), (again.config, same))
    with pytest.raises(ValueError, match=r"n_labels=3: .* no head on its encoder"):
        hf.export(config, params, tmp_path / "out")


def test_half_precision_keeps_logits_float32() -> None:
    config, params = hf.load(FOLDER / "t5", dtype="bfloat16")
    expected = dict(np.load(FOLDER / "t5" / "expected.npz"))
    logits = our_logits(config, params, expected)
    assert logits.dtype == np.float32
    assert relative_error(logits, expected["logits"]) < 0.1


@pytest.mark.parametrize(
    "name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
)
def test_the_embedding_has_four_names(folder: Path, name: str) -> None:
    original = hf.load(folder)
    edit_weights(folder, lambda w: w.update({name: w["shared.weight"]}))
    assert_same_model(original, hf.load(folder))
    edit_weights(folder, lambda w: w.pop("shared.weight"))
    assert_same_model(original, hf.load(folder))


def test_an_own_head_stays_where_the_embedding_has_another_name(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "t5_1_1", tmp_path / "model"))
    original = hf.load(folder)
    edit_weights(folder, lambda w: w.update({"decoder.embed_tokens.weight": w.pop("shared.weight")}))
    edit_config(folder, tie_word_embeddings=None)
    assert_same_model(original, hf.load(folder))


def test_a_copy_that_differs_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"encoder.embed_tokens.weight": w["shared.weight"] + 1}))
    with pytest.raises(ValueError, match=r"encoder\.embed_tokens\.weight.*shared\.weight"):
        hf.load(folder)


def test_what_old_releases_stored_and_never_read_is_ignored(folder: Path) -> None:
    original = hf.load(folder)
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    edit_weights(folder, lambda w: w.update({name: np.zeros((32, 4), np.float32)}))
    assert_same_model(original, hf.load(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"feed_forward_proj": "gated-tanh"},
            ["config.json", "feed_forward_proj='gated-tanh'", "gated-gelu"],
        ),
        ({"relative_attention_num_buckets": 7}, ["relative_attention_num_buckets=7", "even"]),
        ({"relative_attention_max_distance": 16}, ["relative_attention_max_distance=16", "exceed"]),
        ({"decoder_start_token_id": 48}, ["decoder_start_token_id=48", "vocabulary of 48"]),
        ({"num_heads": None}, ["num_heads is missing"]),
        ({"d_ff": 41}, ["DenseReluDense.wo.weight", "(32, 40)", "(32, 41)"]),
        ({"num_layers": 3}, ["missing tensors", "encoder.block.2.layer.0"]),
        ({"num_decoder_layers": 1}, ["unexpected tensors", "decoder.block.1"]),
        ({"feed_forward_proj": "gated-gelu"}, ["missing tensors", "wi_0"]),
    ],
)
def test_a_wrong_config_is_named(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_config(folder, **changes)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r".+") as caught:
        hf.load(folder)
    for word in words:
        assert word in str(caught.value)


def test_configs_that_cannot_be_are_refused() -> None:
    sizes = {"vocab_size": 48, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_mlp": 40}
    assert EncoderDecoderConfig(**sizes).n_decoder_layers == 2
    bad = {
        "n_heads": 5,
        "n_layers": 0,
        "relative_buckets": 2,
        "eos_ids": (48,),
        "n_labels": -1,
        "dtype": "i8",
    }
    for field, value in bad.items():
        with pytest.raises(ValueError, match="d_model" if field == "n_heads" else field):
            EncoderDecoderConfig(**{**sizes, field: value})


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_logits_agree_in_both_directions(name: str, tmp_path: Path) -> None:
    """Sources and targets go beyond 128 tokens, where distances share their last bucket."""
    pytest.importorskip("torch")
    from transformers import T5ForConditionalGeneration

    model = random_t5(VARIANTS[name], seed=1)
    model.save_pretrained(tmp_path / "theirs")
    pair = random_pair(source=150, target=140, seed=1)
    theirs = their_logits(model, pair)
    config, params = hf.load(tmp_path / "theirs")
    assert relative_error(our_logits(config, params, pair), theirs) < TOLERANCE
    hf.export(config, params, tmp_path / "ours")
    assert_same_model((config, params), hf.load(tmp_path / "ours"))
    back, report = T5ForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    np.testing.assert_array_equal(their_logits(back.eval(), pair), theirs)
    assert back.generation_config.decoder_start_token_id == config.decoder_start_id


def test_a_config_of_transformers_4_says_that_the_head_is_untied(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "t5_1_1", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert_same_model(hf.load(FOLDER / "t5_1_1"), hf.load(folder))


@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20), (4, 7), (12, 200)])
@pytest.mark.parametrize("both", [True, False])
def test_buckets_are_those_of_transformers(buckets: int, longest: int, both: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    places = jnp.arange(300)
    ours = relative_buckets(places, places, both_directions=both, buckets=buckets, max_distance=longest)
    ahead = torch.arange(300)[None] - torch.arange(300)[:, None]
    theirs = T5Attention._relative_position_bucket(ahead, both, buckets, longest)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_exporting_what_t5_cannot_say_is_refused(tmp_path: Path) -> None:
    config, params = hf.load(FOLDER / "t5")
    with pytest.raises(ValueError, match="family='llama'"):
        hf.export(dataclasses.replace(config, family="llama"), params, tmp_path / "out")

"""mT5, UMT5, BART, mBART, Pegasus and Marian: parity with transformers, greedy tokens, training, refusals."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import TOLERANCE, assert_same_model, edit_config, edit_weights, relative_error
from seq2seq_models import FORMS, LIMIT, VARIANTS, random_model, their_tokens
from t5_models import FOLDER, our_logits, random_pair, their_logits

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.data.pairs import encode_text
from elastic_lm.models.encoder_decoder import EncoderDecoder
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import make_mesh, param_shardings
from elastic_lm.nn.relative_position import sinusoids
from elastic_lm.train.tasks.seq2seq import PairBatch, SequenceToSequence


class Letters:
    """A tokenizer of single letters."""

    pad_id = bos_id = None
    eos_ids = (2,)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [ord(letter) - 90 for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(i + 90) for i in ids)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden BART to change."""
    return Path(shutil.copytree(FOLDER / "bart", tmp_path / "model"))


def our_tokens(
    config: EncoderDecoderConfig, params: Any, pair: dict[str, np.ndarray], limit: int = LIMIT
) -> list[list[int]]:
    """What our model writes greedily for every source."""
    sources = [row[: sum(mask)].tolist() for row, mask in zip(pair["source"], pair["mask"], strict=True)]
    found = el.TextToText(EncoderDecoder(config), params).generate(sources, max_new_tokens=limit)
    return [result.tokens for result in found]


@pytest.mark.parametrize("name", FORMS)
def test_golden_logits_tokens_and_export(name: str, tmp_path: Path) -> None:
    expected = dict(np.load(FOLDER / name / "expected.npz"))
    config, params = hf.load(FOLDER / name)
    assert isinstance(config, EncoderDecoderConfig)
    assert relative_error(our_logits(config, params, expected), expected["logits"]) < TOLERANCE
    written = [[token for token in row if token >= 0] for row in expected["written"].tolist()]
    assert our_tokens(config, params, expected) == written
    hf.export(config, params, tmp_path / "out")
    assert_same_model((config, params), hf.load(tmp_path / "out"))


@pytest.mark.parametrize("name", [*FORMS, *VARIANTS])
def test_logits_and_tokens_agree_in_both_directions(name: str, tmp_path: Path) -> None:
    """Sources and targets go beyond the distances that share their last bucket."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = random_model(name, seed=1, longest=160)
    model.save_pretrained(tmp_path / "theirs")
    pair = random_pair(source=150, target=140, seed=1)
    theirs = their_logits(model, pair)
    config, params = hf.load(tmp_path / "theirs")
    assert relative_error(our_logits(config, params, pair), theirs) < TOLERANCE
    assert our_tokens(config, params, pair, limit=12) == their_tokens(model, pair, limit=12)

    hf.export(config, params, tmp_path / "ours")
    assert_same_model((config, params), hf.load(tmp_path / "ours"))
    back, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    # Pegasus computes its sinusoids anew, but counts them as missing; the logits below show them.
    missing = {name for name in report["missing_keys"] if not name.endswith("embed_positions.weight")}
    assert not missing, report
    assert not report["unexpected_keys"], report
    np.testing.assert_array_equal(their_logits(back.eval(), pair), theirs)
    assert their_tokens(back, pair, limit=12) == their_tokens(model, pair, limit=12)
    assert isinstance(back, getattr(transformers, json_of(tmp_path / "ours")["architectures"][0]))


def json_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_forced_and_forbidden_tokens() -> None:
    config, params = hf.load(FOLDER / "bart")
    assert (config.forced_bos_id, config.forced_eos_id, config.text_start_id) == (0, 2, 0)
    free = dataclasses.replace(
        config, forced_bos_id=None, forced_eos_id=None, eos_ids=(1,), suppressed_ids=()
    )
    pair = random_pair(batch=1)
    (first,) = our_tokens(free, params, pair, limit=4)
    without = dataclasses.replace(free, suppressed_ids=(first[0],))
    assert our_tokens(without, params, pair, limit=1)[0][0] != first[0]
    forced = dataclasses.replace(free, forced_bos_id=9, forced_eos_id=1)
    (cut,) = our_tokens(forced, params, pair, limit=4)
    assert (cut[0], cut[-1]) == (9, 1)


def test_texts_stand_between_the_models_tokens() -> None:
    config, params = hf.load(FOLDER / "bart")
    model = el.TextToText(EncoderDecoder(config), params, Letters())
    (of_text,) = model.generate("hello", max_new_tokens=LIMIT)
    (of_ids,) = model.generate([0, *Letters().encode("hello"), 2], max_new_tokens=LIMIT)
    assert of_text.tokens == of_ids.tokens
    assert of_text.tokens[0] == 0
    assert of_text.text == Letters().decode([token for token in of_text.tokens[1:] if token != 2])
    assert encode_text(config, Letters(), "hello", 4) == [0, 14, 11, 2]
    marian = hf.load(FOLDER / "marian")[0]
    assert (marian.text_start_id, marian.suppressed_ids, marian.whole_text([5])) == (None, (47,), [5, 0])


def test_a_model_with_vectors_of_positions_has_a_longest_text() -> None:
    config, params = hf.load(FOLDER / "marian")
    model = el.TextToText(EncoderDecoder(config), params)
    assert model.max_len == 24
    (result,) = model.generate([[5] * 24], max_new_tokens=2)  # whose program has 24 columns, not 32
    assert len(result.tokens) <= 2
    with pytest.raises(ValueError, match=r"source 0: tokens=25: is more than max_len=24"):
        model.generate([[5] * 25], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"max_new_tokens=25: the model has 24 positions"):
        model.generate([[5]], max_new_tokens=25)


@pytest.mark.parametrize("name", ["bart", "marian", "umt5"])
@pytest.mark.long
def test_everything_trains_but_the_bias_of_the_logits(name: str) -> None:
    config, params = hf.load(FOLDER / name)
    method, pair = SequenceToSequence(config=config), random_pair()
    trainable, frozen = method.split(params)
    assert set(frozen) == ({"logits_bias"} if config.logits_bias else set())
    start = np.full((3, 1), config.decoder_start_id)
    batch = PairBatch(
        source=jnp.asarray(pair["source"]),
        source_mask=jnp.asarray(pair["mask"]).astype(bool),
        target_in=jnp.asarray(np.concatenate([start, pair["target"][:, :-1]], axis=1)),
        target=jnp.asarray(pair["target"]),
        weights=jnp.ones(pair["target"].shape, jnp.float32),
    )
    slope = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    (before, _), slopes = slope(trainable, frozen, batch, jnp.int32(0))
    still = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(slopes)
        if not np.abs(leaf).max() > 0
    ]
    assert not still
    moved = jax.tree.map(lambda x, leaf: x - 1e-3 * leaf, trainable, slopes)
    assert slope(moved, frozen, batch, jnp.int32(0))[0][0] < before


@pytest.mark.parametrize("name", FORMS)
def test_every_parameter_has_a_place_on_a_mesh(name: str) -> None:
    config, params = hf.load(FOLDER / name)
    shardings = param_shardings(config, make_mesh(devices=jax.devices()[:1]))
    assert jax.tree.structure(shardings) == jax.tree.structure(params)


def test_new_models_begin_near_uniform() -> None:
    config = hf.load(FOLDER / "bart")[0]
    params = init_params(config, jax.random.key(0))
    logits = our_logits(config, params, random_pair())
    entropy = -np.sum(np.asarray(jax.nn.softmax(logits)) * np.asarray(jax.nn.log_softmax(logits)), axis=-1)
    assert entropy.min() > 0.95 * np.log(48)


def test_sinusoids_are_those_of_transformers() -> None:
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.marian.modeling_marian")
    theirs = module.MarianSinusoidalPositionalEmbedding(300, 12).create_weight().numpy()
    np.testing.assert_allclose(sinusoids(300, 12), theirs, rtol=0, atol=1e-7)


def test_umt5_scales_its_head_where_the_file_says_that_it_is_tied(tmp_path: Path) -> None:
    """As transformers 4 did; transformers 5 says of every UMT5 that it is."""
    folder = Path(shutil.copytree(FOLDER / "umt5", tmp_path / "model"))
    config, params = hf.load(folder)
    assert (config.scaled_head, config.tied, config.bias_per_layer) == (True, False, True)
    edit_config(folder, tie_word_embeddings=False)
    plain, same = hf.load(folder)
    assert plain == dataclasses.replace(config, scaled_head=False)
    hf.export(plain, params, tmp_path / "out")
    assert_same_model((plain, same), hf.load(tmp_path / "out"))


def test_base_models_copies_and_stored_sinusoids_load(folder: Path, tmp_path: Path) -> None:
    config, params = hf.load(folder)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.shared.weight"]}))
    edit_weights(
        folder, lambda w: w.update({"model.encoder.embed_tokens.weight": w.pop("model.shared.weight")})
    )
    assert_same_model((config, params), hf.load(folder))

    edit_weights(folder, lambda w: w.pop("final_logits_bias") is None)
    edit_weights(folder, lambda w: {name.removeprefix("model."): value for name, value in w.items()})
    base, without = hf.load(folder)
    assert base == dataclasses.replace(config, logits_bias=False)
    assert set(params) - set(without) == {"logits_bias"}

    marian = Path(shutil.copytree(FOLDER / "marian", tmp_path / "marian"))
    original = hf.load(marian)
    table = {"model.encoder.embed_positions.weight": sinusoids(24, 16)}
    table["model.encoder.version"] = np.full((1,), 3.0, np.float32)
    edit_weights(marian, lambda w: w.update(table))
    assert_same_model(original, hf.load(marian))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder_ffn_dim": 25}, ["decoder_ffn_dim=25", "encoder_ffn_dim=24"]),
        ({"decoder_attention_heads": 2}, ["decoder_attention_heads=2", "one shape"]),
        ({"decoder_vocab_size": 40}, ["decoder_vocab_size=40", "one vocabulary"]),
        ({"share_encoder_decoder_embeddings": False}, ["share_encoder_decoder_embeddings=False", "bart"]),
        ({"forced_bos_token_id": "x"}, ["forced_bos_token_id='x'", "token id"]),
        ({"bad_words_ids": [[3, 4]]}, ["bad_words_ids=[[3, 4]]", "not supported"]),
        ({"max_position_embeddings": 25}, ["embed_positions.weight", "(26, 16)", "(27, 16)"]),
        ({"encoder_layers": 3}, ["missing tensors", "model.encoder.layers.2"]),
        ({"activation_function": "tanh"}, ["activation_function='tanh'"]),
    ],
)
def test_a_wrong_config_is_named(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=r".+") as caught:
        hf.load(folder)
    for word in words:
        assert word in str(caught.value)


def test_generation_config_has_the_last_word(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "forced_eos_token_id": None}))
    assert hf.load(folder)[0].forced_eos_id is None
    file.write_text(json.dumps({"bad_words_ids": [[3, 4]]}))
    with pytest.raises(ValueError, match=r"generation_config\.json: bad_words_ids"):
        hf.load(folder)
    file.unlink()
    config = hf.load(folder)[0]
    assert (config.forced_eos_id, config.suppressed_ids) == (2, ())


def test_configs_that_cannot_be_are_refused() -> None:
    sizes = {"vocab_size": 48, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_mlp": 40}
    bad = {
        "max_len": {"positions": "learned"},
        "forced_eos_id": {"forced_eos_id": 48},
        "suppressed_ids": {"suppressed_ids": (99,)},
        "norm": {"norm": "none"},
        "positions": {"positions": "rope"},
    }
    for field, changes in bad.items():
        with pytest.raises(ValueError, match=field):
            EncoderDecoderConfig(**{**sizes, **changes})

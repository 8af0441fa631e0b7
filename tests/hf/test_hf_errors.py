"""Every way in which a folder can be wrong: the message names the file, the tensor and the fix."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_models import assert_same_model, edit_config, edit_weights, random_params
from safetensors.numpy import load_file, save_file

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.config.model import ExitConfig, ExitKind, ModelConfig, RopeConfig
from elastic_lm.hf.files import TensorFiles

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden" / "hf"
QUERY = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden Llama to damage."""
    return Path(shutil.copytree(GOLDEN_FOLDER / "llama", tmp_path / "model"))


def refuses(folder: Path, *words: str, error: type[Exception] = ValueError) -> None:
    """Checks that loading fails with all of `words` in the message."""
    with pytest.raises(error) as caught:
        hf.load(folder)
    for word in words:
        assert word in str(caught.value)


def test_missing_folder_and_files(folder: Path, tmp_path: Path) -> None:
    refuses(tmp_path / "absent", "absent", "no such folder", "ORG/NAME", error=FileNotFoundError)
    refuses(folder / "config.json", "config.json", "not a folder")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(folder, "model.safetensors", "pytorch_model.bin", "save_pretrained", error=FileNotFoundError)
    (folder / "config.json").unlink()
    refuses(folder, "config.json", "no such file", error=FileNotFoundError)


def test_el_load_says_what_it_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.*config\.json.*elastic_config\.json"):
        el.load(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"config\.json.*elastic_config\.json.*notes\.txt"):
        el.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\x00"])
def test_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refuses(folder, "config.json", "JSON")


def test_truncated_shard_names_the_first_tensor_that_is_cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refuses(folder, "model.safetensors", "model.norm.weight", "damaged", "again")


@pytest.mark.parametrize("content", [b"", b"abc", b"<html>not found</html>", b"\xff" * 64])
def test_corrupt_shard(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    refuses(folder, "model.safetensors", "damaged", "again")


def test_shards_of_the_index(folder: Path) -> None:
    config, params = hf.load(folder)
    out = folder / "sharded"
    hf.export(config, params, out, max_shard_bytes=20_000)
    index = json.loads((out / INDEX).read_text())
    shard = out / index["weight_map"][QUERY]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refuses(out, shard.name, "damaged", "model.layers.1")
    shard.unlink()
    refuses(out, shard.name, "model.layers.1", "missing shard", error=FileNotFoundError)
    shard.write_bytes(content)
    index["weight_map"]["model.norm.weight"] = shard.name
    (out / INDEX).write_text(json.dumps(index))
    refuses(out, shard.name, "'model.norm.weight' is missing", INDEX)
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (out / INDEX).write_text(json.dumps(index))
    refuses(out, INDEX, "model.norm.weight", "outside")
    (out / INDEX).write_text("{}")
    refuses(out, INDEX, "weight_map")


def test_one_file_of_weights_goes_before_an_index_that_was_left_behind(
    folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """As in `transformers`, which reads the index only where there is no model.safetensors."""
    config, params = hf.load(folder)
    weights = load_file(folder / "model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    save_file({name: tensor * 0 for name, tensor in weights.items()}, folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / INDEX).write_text(json.dumps(index))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=rf"model\.safetensors is read.*{INDEX}.*{shard} and is ignored"):
        assert_same_model((config, params), hf.load(folder))

    (folder / shard).unlink()
    with pytest.warns(UserWarning, match=r"is ignored"):
        assert_same_model((config, params), hf.load(folder))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "model.safetensors")}))
    assert_same_model((config, params), hf.load(folder))
    assert len(recwarn.list) == 0


def test_missing_tensors(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    refuses(folder, "'lm_head.weight'", "model.safetensors", "tie_word_embeddings")
    edit_weights(folder, lambda weights: weights.pop(QUERY))
    refuses(folder, repr(QUERY), "model.safetensors", "config.json")


def test_unexpected_tensors(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"v_head.bias": np.zeros(3, np.float32)}))
    with pytest.warns(UserWarning, match=r"model\.safetensors.*v_head\.bias"):
        hf.load(folder)
    extra = QUERY.replace("weight", "bias")
    edit_weights(folder, lambda weights: weights.update({extra: np.zeros(32, np.float32)}))
    refuses(folder, "model.safetensors", extra, "unexpected", "remove")
    edit_config(folder, num_hidden_layers=1)
    refuses(folder, "model.safetensors", "model.layers.1.", "and 2 more")


def test_known_buffers_are_ignored(folder: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    edit_weights(folder, lambda weights: weights.update(buffer))
    hf.load(folder)


def test_wrong_shapes_and_dtypes(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({QUERY: weights[QUERY][:-1]}))
    refuses(folder, "model.safetensors", repr(QUERY), "(31, 32)", "(32, 32)", "config.json")
    edit_weights(folder, lambda weights: weights.update({QUERY: np.zeros((32, 32), np.int8)}))
    refuses(folder, "model.safetensors", repr(QUERY), "I8", "Dequantise")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "qwen2_moe"},
            ("'qwen2_moe'", "closest is 'qwen2', which has no experts", "gpt_neox, nem"),
        ),
        ({"model_type": "mamba"}, ("'mamba' is not supported. Supported: llama",)),
        ({"model_type": "apertus"}, ("'apertus' is not supported. Supported: llama",)),
        ({"model_type": None}, ("model_type=None", "Supported: llama")),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2}}, ("rope_scaling", "'mrope'", "yarn")),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2}},
            ("rope_scaling", "short_factor is missing"),
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, ("mrope_section=[1]",)),
        ({"no_rope_layers": [1, 0]}, ("no_rope_layers=[1, 0]", "'llama'", "remove the key")),
        ({"residual_multiplier": 0.2}, ("residual_multiplier=0.2", "own model_type")),
        ({"clip_qkv": 8.0}, ("clip_qkv=8.0",)),
        ({"sliding_window": 4096}, ("sliding_window=4096",)),
        ({"use_qk_norm": True}, ("use_qk_norm=True",)),
        ({"rope_scaling": {"type": "linear"}}, ("rope_scaling", "factor")),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, ("low_freq_factor is missing",)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ("rope_parameters", "flat")),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor=0.5", "whole heads")),
        ({"rope_theta": "x"}, ("rope_theta='x'", "number")),
        ({"rope_scaling": {"rope_type": ["x"]}}, ("rope_type=['x']",)),
        ({"hidden_act": ["x"]}, ("hidden_act=['x']",)),
        ({"elastic": [1]}, ("elastic=[1]", "mapping")),
        ({"hidden_act": "quick_gelu"}, ("hidden_act='quick_gelu'", "gelu_new")),
        ({"hidden_size": "32"}, ("hidden_size='32'", "int")),
        ({"hidden_size": None}, ("hidden_size is missing",)),
        ({"hidden_size": -32}, ("hidden_size=-32", "at least 1")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads=3: must divide num_attention_heads=4",)),
        ({"rms_norm_eps": -1.0}, ("rms_norm_eps=-1.0", "at least 0")),
        ({"bos_token_id": [1]}, ("bos_token_id=[1]", "int")),
        ({"elastic": {"version": 1, "exits": 3}}, ("'exits': 3", "list of exits")),
        ({"elastic": {"version": 1, "exits": [{}]}}, ("needs elastic.exits[0].layer",)),
        ({"num_attention_heads": 5}, ("head_dim",)),
        ({"attention_bias": "per_head"}, ("attention_bias='per_head'", "bool")),
        ({"quantization_config": {"bits": 4}}, ("quantization_config", "dequantise")),
        ({"elastic": {"version": 99}}, ("elastic.version=99",)),
        ({"elastic": {"version": 1, "exits": [{"layr": 1}]}}, ("elastic.exits[0].layr", "layer")),
    ],
)
def test_unsupported_settings(folder: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    edit_config(folder, **{"head_dim": None, **changes})
    refuses(folder, "config.json", *words)


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx=True",)),
        ("llama", {"eos_token_id": "x"}, ("eos_token_id=('x',)", "token id")),
        ("mistral", {"sliding_window": "x"}, ("sliding_window='x'", "number")),
        ("mistral", {"sliding_window": 4.5}, ("sliding_window=4.5", "whole")),
        ("mistral", {"sliding_window": -1}, ("sliding_window=-1", "at least 0")),
        ("qwen2", {"use_sliding_window": "false"}, ("use_sliding_window='false'", "bool")),
        ("qwen2", {"max_window_layers": "x"}, ("max_window_layers='x'", "int")),
        ("gpt2", {"n_inner": "x"}, ("n_inner='x'", "int")),
        ("gpt2", {"scale_attn_weights": "no"}, ("scale_attn_weights='no'", "bool")),
        ("gemma2", {"hidden_size": -32}, ("hidden_size=-32", "at least 1")),
        ("gemma2", {"query_pre_attn_scalar": 0}, ("query_pre_attn_scalar=0", "above 0")),
        ("qwen2", {"layer_types": 3}, ("layer_types=3", "list")),
        ("gpt2", {"add_cross_attention": True}, ("add_cross_attention=True", "gpt2")),
        ("gemma2", {"use_bidirectional_attention": True}, ("use_bidirectional_attention",)),
        ("qwen2", {"layer_types": ["full_attention"]}, ("layer_types", "2 entries")),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, ("layer_types", "'sliding_attention'")),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False},
            ("use_sliding_window",),
        ),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types", "remove")),
        ("nemotron", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, ("'ntk'", "supported")),
    ],
)
def test_unsupported_settings_of_one_family(
    model_type: str, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    entries = json.loads((GOLDEN_FOLDER / model_type / "config.json").read_text())
    with pytest.raises(ValueError, match=r".") as caught:
        hf.config_from_hf({**entries, **changes})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("ids", [{"eos_token_id": "x"}, {"bos_token_id": "x"}])
def test_bad_generation_ids_name_their_own_file(folder: Path, ids: dict[str, str]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(ids))
    refuses(folder, "generation_config.json", f"{next(iter(ids))}=", "'x'")


def test_generation_ids_come_before_those_of_the_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [4], "bos_token_id": null}')
    config, _ = hf.load(folder)
    assert (config.bos_id, config.eos_ids) == (1, (4,))


def test_ids_of_minus_one_are_none(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit_config(folder, bos_token_id=-1, eos_token_id=-1)
    config, _ = hf.load(folder)
    assert (config.bos_id, config.eos_ids) == (None, ())
    edit_config(folder, bos_token_id=1, eos_token_id=[2, -1])
    (folder / "generation_config.json").write_text('{"eos_token_id": -1, "bos_token_id": -1}')
    config, _ = hf.load(folder)
    assert (config.bos_id, config.eos_ids) == (1, (2,))


def test_a_null_context_is_our_own_default(folder: Path) -> None:
    edit_config(folder, max_position_embeddings=None)
    assert hf.load(folder)[0].max_len == ModelConfig.max_len


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"vocab_size": "x"}'])
def test_damaged_elastic_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "elastic_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"elastic_config\.json: "):
        el.load(tmp_path)


def test_tied_in_name_only(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"lm_head\.weight.*model\.embed_tokens\.weight.*differ"):
        config, params = hf.load(folder)
    assert not config.tied
    edit_config(folder, tie_word_embeddings=False)
    assert_same_model((config, params), hf.load(folder))


def test_a_tied_embedding_is_found_under_either_name(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)

    def tie(weights: dict[str, np.ndarray]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    edit_weights(folder, tie)
    both = hf.load(folder)
    assert both[0].tied
    edit_weights(folder, lambda weights: weights.pop("model.embed_tokens.weight"))
    assert_same_model(both, hf.load(folder))
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    refuses(folder, "model.embed_tokens.weight", "missing")


CONFIG = ModelConfig(vocab_size=16, d_model=8, n_layers=2, n_heads=2, d_mlp=8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"family": "llama", "windows": (4, 4)}, ("'llama'", "windows=[4, 4]")),
        ({"family": "llama", "qk_norm": True}, ("qk_norm=True",)),
        ({"family": "mistral", "windows": (0, 4)}, ("windows=[0, 4]",)),
        ({"family": "llama", "rope": RopeConfig(fraction=0.5)}, ("rope=",)),
        ({"family": "gpt2"}, ("norm='rmsnorm'", "gated=True", "position='rope'")),
        ({"family": "gemma2", "attn_scale": 0.3}, ("attn_scale=0.3",)),
        ({"family": "llama", "qkv_bias": True}, ("qkv_bias=True",)),
        ({"family": "lama"}, ("'lama' is not supported. Supported: llama",)),
    ],
)
def test_models_that_a_family_cannot_express(
    config: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    model = ModelConfig(**{**vars(CONFIG), **config})
    with pytest.raises(ValueError, match=r".") as caught:
        hf.config_to_hf(model)
    for word in words:
        assert word in str(caught.value)


def test_export_checks_parameters_and_target(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    with pytest.raises(ValueError, match=r"params has no exit_1/head/kernel"):
        hf.export(CONFIG.with_exits((ExitConfig(1),)), params, tmp_path / "a")
    wrong = {**params, "embed": {"table": params["embed"]["table"][1:]}}
    with pytest.raises(ValueError, match=r"embed/table.*\(15, 8\).*\(16, 8\)"):
        hf.export(CONFIG, wrong, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    hf.export(CONFIG, params, tmp_path / "a")
    with pytest.raises(FileExistsError, match=r"a: exists already.*overwrite"):
        hf.export(CONFIG, params, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"no Hugging Face folder"):
        hf.export(CONFIG, params, tmp_path / "b", overwrite=True)
    other = random_params(CONFIG, seed=1)
    notes = tmp_path / "a" / "notes.md"
    notes.write_text("precious")
    with pytest.raises(FileExistsError, match=r"notes\.md: not written by an export"):
        hf.export(CONFIG, other, tmp_path / "a", overwrite=True)
    notes.unlink()
    hf.export(CONFIG, other, tmp_path / "a", overwrite=True)
    assert_same_model(hf.load(tmp_path / "a"), (CONFIG, other))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken:
        def save(self, folder: str | Path) -> None:
            raise OSError("disk full")

    params = random_params(CONFIG)
    hf.export(CONFIG, params, tmp_path / "a")
    before = sorted(path.name for path in (tmp_path / "a").iterdir())
    with pytest.raises(OSError, match="disk full"):
        hf.export(CONFIG, random_params(CONFIG, seed=1), tmp_path / "a", Broken(), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before
    assert_same_model(hf.load(tmp_path / "a"), (CONFIG, params))


def test_missing_exit_tensors(tmp_path: Path) -> None:
    config = CONFIG.with_exits((ExitConfig(1),))
    hf.export(config, random_params(config), tmp_path / "a")
    exits = tmp_path / "a" / "elastic_exits.safetensors"
    weights = load_file(exits)
    assert "elastic.exits.1.mlp.gate_proj.weight" in weights
    weights.pop("elastic.exits.1.norm.weight")
    save_file(weights, exits)
    refuses(tmp_path / "a", "elastic.exits.1.norm.weight", exits.name, "elastic block")
    exits.unlink()
    refuses(tmp_path / "a", exits.name, error=FileNotFoundError)


@pytest.mark.parametrize("kind", ["norm", "mlp", "block"])
def test_gates_are_carried(kind: ExitKind, tmp_path: Path) -> None:
    config = CONFIG.with_exits((ExitConfig(1, kind, tied=True, gate=4),))
    params = random_params(config)
    hf.export(config, params, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "elastic_exits.safetensors")
    assert {name: stored[name].shape for name in stored if ".1.gate." in name} == {
        "elastic.exits.1.gate.up.weight": (4, 8),
        "elastic.exits.1.gate.up.bias": (4,),
        "elastic.exits.1.gate.down.weight": (1, 4),
        "elastic.exits.1.gate.down.bias": (1,),
    }
    assert_same_model(hf.load(tmp_path / "a"), (config, params))


def test_bfloat16_round_trip_is_exact(tmp_path: Path) -> None:
    config, params = hf.load(GOLDEN_FOLDER / "gemma2", dtype="bfloat16")
    hf.export(config, params, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")["model.norm.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    assert_same_model((config, params), hf.load(tmp_path / "a", dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"dtype='int8'.*bfloat16"):
        hf.load(tmp_path / "a", dtype="int8")


@pytest.mark.parametrize(
    "start",
    [
        b"[1, 2]",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": {"data_offsets": []}}',
        b'{"a": 1}',
    ],
)
def test_headers_of_any_kind_are_one_error(start: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for length in (len(start), len(start) | 1 << 60, 1 << 33):  # a flipped bit must not read all of the file
        file.write_bytes(struct.pack("<Q", length) + start)
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged safetensors file") as caught:
            TensorFiles({}).add(file)
        assert "\n" not in str(caught.value)

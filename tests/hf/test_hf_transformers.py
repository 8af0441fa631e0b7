"""Live comparison with transformers: random models of every family in many forms, both directions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import (
    GOLDEN,
    TOLERANCE,
    VARIANTS,
    assert_same_model,
    export_and_reload,
    load_theirs,
    our_logits,
    random_ids,
    random_model,
    random_params,
    relative_error,
    their_logits,
)

from elastic_lm import hf
from elastic_lm.config.model import ExitConfig
from elastic_lm.nn.rope import rope_frequencies

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = VARIANTS | {name: (name, {}) for name in GOLDEN}


@pytest.mark.parametrize("name", sorted(CASES))
def test_logits_agree_in_both_directions(name: str, tmp_path: Path) -> None:
    model = random_model(*CASES[name], seed=1)
    model.save_pretrained(tmp_path / "theirs")
    tokens = random_ids(model.config.vocab_size)
    theirs = their_logits(model, tokens)
    config, params = hf.load(tmp_path / "theirs")
    assert relative_error(our_logits(config, params, tokens), theirs) < TOLERANCE
    back = export_and_reload(config, params, tmp_path / "ours")
    for name, weight in back.state_dict().items():
        np.testing.assert_array_equal(weight.numpy(), model.state_dict()[name].numpy(), err_msg=name)
    assert relative_error(their_logits(back, tokens), theirs) < 1e-6


def test_bfloat16_weights_agree(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "theirs"
    model = random_model("gpt2", {}).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokens = random_ids(model.config.vocab_size)
    theirs = their_logits(load_theirs(folder), tokens)
    config, params = hf.load(folder, dtype="float32")
    assert relative_error(our_logits(config, params, tokens), theirs) < TOLERANCE
    config, params = hf.load(folder, dtype="bfloat16")
    assert relative_error(our_logits(config, params, tokens), theirs) < 0.1
    back = export_and_reload(config, params, tmp_path / "ours")
    assert back.dtype == torch.bfloat16
    half = their_logits(load_theirs(folder, "bfloat16"), tokens)
    np.testing.assert_array_equal(their_logits(back, tokens), half)


def test_sharded_folders_both_ways(tmp_path: Path) -> None:
    model = random_model("qwen2", {})
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one = hf.load(tmp_path / "one")
    assert_same_model(one, hf.load(tmp_path / "many"))
    back = export_and_reload(*one, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    tokens = random_ids(model.config.vocab_size)
    np.testing.assert_array_equal(their_logits(back, tokens), their_logits(model, tokens))


def test_checkpoints_of_the_base_model_and_with_old_buffers_load(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = random_model("gpt2", {})
    model.save_pretrained(tmp_path)
    whole = hf.load(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    bare |= {
        "h.0.attn.bias": np.ones((1, 1, 64, 64), np.uint8),
        "h.1.attn.masked_bias": np.ones((), np.float32),
    }
    save_file(bare, tmp_path / "model.safetensors")
    assert_same_model(whole, hf.load(tmp_path))


OLD_STYLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama3": (
        "llama",
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen2": (
        "qwen2",
        {"rope_theta": 900.0, "rope_scaling": {"type": "yarn", "factor": 2.0}, "max_window_layers": 0},
    ),
    "gpt_neox": ("gpt_neox", {"rotary_emb_base": 300, "rotary_pct": 0.5}),
    "nemotron": ("nemotron", {"rope_theta": 300.0, "partial_rotary_factor": 0.25}),
}


@pytest.mark.parametrize("name", sorted(OLD_STYLE))
def test_rotary_settings_in_the_style_of_transformers_4(name: str, tmp_path: Path) -> None:
    model_type, old = OLD_STYLE[name]
    random_model(model_type, {}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    entries.pop("rope_parameters")
    entries.pop("layer_types", None)
    path.write_text(json.dumps({**entries, **old}))
    tokens = random_ids(48)
    theirs = their_logits(load_theirs(tmp_path), tokens)
    config, params = hf.load(tmp_path)
    assert config.rope.theta == (old.get("rope_theta") or old.get("rotary_emb_base"))
    assert relative_error(our_logits(config, params, tokens), theirs) < TOLERANCE


@pytest.mark.parametrize("model_type", sorted(GOLDEN))
def test_missing_keys_mean_what_they_mean_to_transformers(model_type: str) -> None:
    """A config.json that states nothing but the family: every default is transformers'."""
    theirs = transformers.AutoConfig.for_model(model_type)
    stated = json.loads(theirs.to_json_string(use_diff=False))
    bare = {"model_type": model_type}
    bare |= {key: stated[key] for key in stated if key in REQUIRED_KEYS}
    assert hf.config_from_hf(bare) == hf.config_from_hf(stated)


REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_embd",
    "n_layer",
    "n_head",
    "num_layers",
    "num_heads",
    "ffn_dim",
    "attention_types",
)


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt2", "gpt_neox", "nemotron", "gptj", "falcon", "bloom"]
)
def test_exits_are_carried_and_transformers_loads_the_full_model(model_type: str, tmp_path: Path) -> None:
    model = random_model(model_type, {})
    model.save_pretrained(tmp_path / "theirs")
    config, backbone = hf.load(tmp_path / "theirs")
    exits = (
        ExitConfig(1, kind="mlp", temperature=0.7),
        ExitConfig(2, kind="block", tied=True, init="random"),
    )
    if model_type == "llama":
        exits = (ExitConfig(1, kind="embedding"), ExitConfig(2, kind="norm", tied=True))
    config = config.with_exits(exits)
    params = {**random_params(config), **backbone}
    back = export_and_reload(config, params, tmp_path / "ours")
    tokens = random_ids(config.vocab_size)
    np.testing.assert_array_equal(their_logits(back, tokens), their_logits(model, tokens))


def test_long_contexts_keep_the_precision(tmp_path: Path) -> None:
    sizes = {"max_position_embeddings": 2048, "hidden_size": 64, "num_attention_heads": 1}
    model = random_model("llama", {**sizes, "num_key_value_heads": 1, "num_hidden_layers": 1})
    model.save_pretrained(tmp_path)
    config, params = hf.load(tmp_path)
    tokens = random_ids(48, (1, 1500))
    assert relative_error(our_logits(config, params, tokens), their_logits(model, tokens)) < TOLERANCE
    frequency, _ = rope_frequencies(config.rope, config.rotary_dim, config.max_len)
    np.testing.assert_allclose(frequency, model.model.rotary_emb.inv_freq.numpy(), rtol=3e-7)


def test_gemma2_without_windows_is_written_so_that_transformers_runs_it(tmp_path: Path) -> None:
    random_model("gemma2", {}).save_pretrained(tmp_path / "theirs")
    config, params = hf.load(tmp_path / "theirs")
    config = dataclasses.replace(config, windows=())
    back = export_and_reload(config, params, tmp_path / "ours")
    tokens = random_ids(config.vocab_size)
    assert relative_error(our_logits(config, params, tokens), their_logits(back, tokens)) < TOLERANCE


def test_stop_tokens_are_carried(tmp_path: Path) -> None:
    model = random_model("llama", {"eos_token_id": 4})
    model.generation_config.eos_token_id = [4, 9]
    model.save_pretrained(tmp_path / "theirs")
    config, params = hf.load(tmp_path / "theirs")
    assert (config.bos_id, config.eos_ids) == (1, (4, 9))
    back = export_and_reload(config, params, tmp_path / "ours")
    assert back.generation_config.eos_token_id == [4, 9]
    without = dataclasses.replace(config, bos_id=None, eos_ids=())
    back = export_and_reload(without, params, tmp_path / "without")
    assert back.generation_config.eos_token_id is None
    assert back.generation_config.bos_token_id is None

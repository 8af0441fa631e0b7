"""What GPT-Neo, GPT-J, OPT, BLOOM, Falcon, Phi, StableLM and StarCoder read, refuse and keep."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hf_models import (
    TOLERANCE,
    VARIANTS,
    export_and_reload,
    our_logits,
    random_ids,
    random_model,
    relative_error,
    their_logits,
)

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.config.subnet import Subnet
from elastic_lm.cost.counted import model_cost
from elastic_lm.width.slicing import slice_params

FOLDER = Path(__file__).parents[1] / "golden" / "hf"


def entries_of(model_type: str) -> dict[str, Any]:
    return json.loads((FOLDER / model_type / "config.json").read_text())


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "OPT-350M norms": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False is not supported"),
    "OPT-350M width": ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16: embeddings of another"),
    "StableLM 12B": ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True is not supported"),
    "Phi with norms": ("phi", {"qk_layernorm": True}, "qk_layernorm=True is not supported"),
    "tied head with a bias": ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings=True: a vocabulary"),
    "kinds of attention": (
        "gpt_neo",
        {"attention_layers": None, "attention_types": [[["global", "sparse"], 1]]},
        "attention_types=.*must be 2 kinds in all",
    ),
    "too few kinds": (
        "gpt_neo",
        {"attention_layers": None, "attention_types": [[["global"], 1]]},
        "attention_types=.*must be 2 kinds in all",
    ),
    "kinds of no list": ("gpt_neo", {"attention_layers": 3}, "attention_layers=3: must be 2 kinds"),
    "window": ("gpt_neo", {"window_size": 2.5}, "window_size=2.5: must be a whole number"),
    "odd rotation": ("gptj", {"rotary_dim": 3}, "rotary_dim=3: must be even, and at most 8"),
    "wide rotation": ("gptj", {"rotary_dim": 10}, "rotary_dim=10: must be even, and at most 8"),
    "sequential Falcon": (
        "falcon",
        {"new_decoder_architecture": True, "parallel_attn": False},
        "parallel_attn=False: must be true with new_decoder_architecture",
    ),
    "two norms": (
        "falcon",
        {"num_ln_in_parallel_attn": 2},
        "num_ln_in_parallel_attn=2: must be 1, or 2 with",
    ),
    "normed residuals": (
        "bloom",
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm=True is not supported",
    ),
    "BLOOM's activation": ("bloom", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_by_its_key(name: str) -> None:
    model_type, changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        hf.config_from_hf(entries_of(model_type) | changes)


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "bloom-560m": (
        {
            "model_type": "bloom",
            "vocab_size": 250880,
            "n_embed": 1024,
            "n_layer": 24,
            "num_attention_heads": 16,
        },
        559_214_592,
    ),
    "opt-125m": (
        {
            "model_type": "opt",
            "vocab_size": 50272,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "ffn_dim": 3072,
            "word_embed_proj_dim": 768,
            "prefix": "</s>",
        },
        125_239_296,
    ),
    "gpt-neo-125m": (
        {
            "model_type": "gpt_neo",
            "vocab_size": 50257,
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "intermediate_size": None,
            "attention_types": [[["global", "local"], 6]],
        },
        125_198_592,
    ),
    "gpt-j-6B": (
        {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16},
        6_050_882_784,
    ),
    "starcoder": (
        {
            "model_type": "gpt_bigcode",
            "vocab_size": 49152,
            "n_embd": 6144,
            "n_layer": 40,
            "n_head": 48,
            "n_inner": 24576,
            "n_positions": 8192,
        },
        15_517_456_384,
    ),
    "falcon-7b": (
        {
            "model_type": "falcon",
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "num_kv_heads": 71,
        },
        6_921_720_704,
    ),
    "phi-2": (
        {
            "model_type": "phi",
            "vocab_size": 51200,
            "hidden_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 10240,
            "partial_rotary_factor": 0.4,
        },
        2_779_683_840,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name: str) -> None:
    entries, parameters = PUBLISHED[name]
    assert model_cost(hf.config_from_hf(entries)).parameters == parameters


def test_blooms_published_names_of_sizes_are_read() -> None:
    """Such as bloom-560m, which says `n_embed` and `num_attention_heads`."""
    entries = entries_of("bloom")
    config = hf.config_from_hf(entries)
    other = {"n_embed": entries["hidden_size"], "num_attention_heads": entries["n_head"]}
    published = {key: entries[key] for key in entries if key not in ("hidden_size", "n_head")}
    assert hf.config_from_hf(published | other | {"seq_length": 2048}) == config
    assert hf.config_from_hf(entries | {"hidden_size": 7} | other) == config  # as transformers has it
    assert hf.config_from_hf(published | other | {"seq_length": 512}).max_len == 512


def test_gpt_neos_layers_go_before_its_pattern() -> None:
    entries = entries_of("gpt_neo")
    assert entries["attention_layers"] == ["global", "local"]
    config = hf.config_from_hf(entries | {"attention_layers": ["local", "global"]})
    assert config.windows == (5, 0)
    del entries["attention_layers"]
    assert hf.config_from_hf(entries).windows == (0, 5)


def test_every_rotated_width_of_gptj_survives_its_fraction() -> None:
    entries = entries_of("gptj") | {"n_head": 1}
    for width in (6, 10, 49, 80, 98, 128, 256):
        for rotated in range(2, width + 1, 2):
            config = hf.config_from_hf(entries | {"n_embd": width, "rotary_dim": rotated})
            assert config.rotary_dim == rotated
            assert hf.config_to_hf(config)["rotary_dim"] == rotated


@pytest.mark.parametrize("model_type", ["gptj", "opt", "falcon", "bloom", "phi"])
def test_heads_of_a_width_of_their_own_are_not_written(model_type: str) -> None:
    config = hf.config_from_hf(entries_of(model_type))
    other = dataclasses.replace(config, head_dim=16)
    with pytest.raises(ValueError, match=rf"family='{model_type}' cannot express.*head_dim=16"):
        hf.config_to_hf(other)


def test_a_model_with_a_biased_head_is_no_llama() -> None:
    config = el.testing.tiny_config(head_bias=True)
    with pytest.raises(ValueError, match=r"family='llama' cannot express.*head_bias=True"):
        hf.config_to_hf(config)


@pytest.mark.long
@pytest.mark.parametrize("name", ["bloom-six-heads", "falcon-alibi", "falcon-alibi-32"])
def test_long_texts_agree_under_alibi(name: str, tmp_path: Path) -> None:
    """Falcon's penalties, not BLOOM's, are rounded to bfloat16: 32 slopes, and positions from 256 on."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = random_model(*VARIANTS[name])
    model.save_pretrained(tmp_path)
    tokens = random_ids(48, (1, 300))
    config, params = hf.load(tmp_path)
    published = their_logits(model, tokens)
    assert relative_error(our_logits(config, params, tokens), published) < TOLERANCE

    if name != "bloom-six-heads":
        exact = our_logits(dataclasses.replace(config, alibi_rounded=False), params, tokens)
        assert relative_error(exact, published) > TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("name", ["falcon-alibi", "falcon-grouped", "bloom-six-heads", "stablelm-sequential"])
def test_greedy_text_of_further_forms_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = random_model(*VARIANTS[name], seed=2)
    model.save_pretrained(tmp_path)
    prompt = random_ids(48, (1, 11), seed=3)
    settings = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(torch.tensor(prompt), **settings)[0, 11:].tolist()
    sampler = el.Sampler(*el.load(tmp_path))
    assert sampler.sample(prompt[0].tolist(), 10, ignore_eos=True).tokens == expected


def test_slices_of_families_with_fused_or_permuted_heads_are_exact(tmp_path: Path) -> None:
    """Half of GPT-J's and BigCode's neurons; what is exported is what is loaded, permuted rows too."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for model_type in ("gptj", "gpt_bigcode"):
        config, params = hf.load(FOLDER / model_type)
        small, cut = slice_params(config, params, Subnet.uniform(config, mlp=0.5, depth=0.5))
        back = export_and_reload(small, cut, tmp_path / model_type)
        tokens = random_ids(config.vocab_size)
        assert relative_error(our_logits(small, cut, tokens), their_logits(back, tokens)) < TOLERANCE


def test_exits_of_gptj_have_the_bias_of_its_head(tmp_path: Path) -> None:
    config, params = hf.load(FOLDER / "gptj")
    exits = (el.ExitConfig(1, "norm"), el.ExitConfig(2, "norm", tied=True))
    config, params = el.attach_exits(config, params, exits, jax.random.key(0))
    np.testing.assert_array_equal(params["exit_1"]["head"]["bias"], params["head"]["bias"])
    logits = el.testing.all_logits(config, params, random_ids(config.vocab_size))
    assert config.n_layers == 2  # the second exit is after the last layer, so that it is the model
    hf.export(config, params, tmp_path / "out")
    again = el.testing.all_logits(*hf.load(tmp_path / "out"), random_ids(config.vocab_size))
    for depth in (1, 2):
        np.testing.assert_array_equal(again[depth], logits[depth])
    unbiased = {
        **params,
        "exit_1": {**params["exit_1"], "head": {"kernel": params["exit_1"]["head"]["kernel"]}},
    }
    unbiased["exit_1"]["head"]["bias"] = 0 * params["head"]["bias"]
    without = el.testing.all_logits(config, unbiased, random_ids(config.vocab_size))[1]
    np.testing.assert_allclose(
        logits[1] - without, np.broadcast_to(params["head"]["bias"], without.shape), atol=1e-5
    )

"""What single families of decoders need besides equal logits: text, context, parts, keys of config.json."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from hf_models import (
    GOLDEN,
    TOLERANCE,
    assert_same_model,
    edit_config,
    export_and_reload,
    our_logits,
    random_ids,
    random_model,
    relative_error,
    their_logits,
)

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.config.rope import RopeConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.cost.counted import model_cost
from elastic_lm.hf.relatives import RELATIVES
from elastic_lm.models.decoder import Decoder, stack_layers
from elastic_lm.models.registry import abstract_params
from elastic_lm.models.sharding import make_mesh, param_shardings
from elastic_lm.width.slicing import mask_params, slice_params

FOLDER = Path(__file__).parents[1] / "golden" / "hf"
NEW = 10
QUICK = ("phi3", "cohere2")  # of the families whose text is compared; the others are long to compile


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in sorted(GOLDEN)]
)
def test_greedy_text_is_that_of_transformers(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / name, attn_implementation="eager")
    prompt = random_ids(model.config.vocab_size, (1, 11), seed=3)
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(torch.tensor(prompt), **settings)[0, 11:].tolist()
    sampler = el.Sampler(*el.load(FOLDER / name))
    assert sampler.sample(prompt[0].tolist(), NEW, ignore_eos=True).tokens == expected


@pytest.mark.long
def test_longrope_decodes_on_both_sides_of_its_switch_and_refuses_to_cross_it(tmp_path: Path) -> None:
    """The golden Phi-3 with a context of 12 tokens that is not stretched."""
    folder = Path(shutil.copytree(FOLDER / "phi3", tmp_path / "phi3"))
    entries = json.loads((folder / "config.json").read_text())
    rope = entries["rope_parameters"] | {"original_max_position_embeddings": 12}
    edit_config(folder, original_max_position_embeddings=12, rope_parameters=rope)
    decoder, params = el.load(folder)
    exits = (el.ExitConfig(1, "block", tied=True, init="copy"),)
    config, params = el.attach_exits(decoder.config, params, exits, jax.random.key(0))
    never = el.ConfidenceExit("max_prob", thresholds=(2.0,), layers=(1,))
    sampler = el.Sampler(Decoder(config), params, exit=never)

    def expected(prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(np.argmax(our_logits(config, params, np.asarray([tokens]))[0, -1])))
        return tokens[len(prompt) :]

    # The rows of one batch lie on different sides; all of them are padded beyond the switch.
    prompts = [random_ids(config.vocab_size, (1, n), seed=n)[0].tolist() for n in (3, 20, 9)]
    samples = sampler.sample(prompts, 4, ignore_eos=True)
    assert [sample.tokens for sample in samples] == [expected(p, 4) for p in prompts]

    with pytest.raises(ValueError, match=r"prompt 0 has 9 tokens.*original_max_len=12.*at most 4 tokens"):
        sampler.sample(prompts[2], 5)


def test_growing_queries_and_kinds_of_rotation_need_their_numbers() -> None:
    config = el.testing.tiny_config()
    with pytest.raises(ValueError, match=r"query_growth=0\.1: needs position='rope' and rope\.original"):
        dataclasses.replace(config, query_growth=0.1)
    with pytest.raises(ValueError, match=r"rotated=\(True, False\): needs one entry per layer \(4\)"):
        dataclasses.replace(config, rotated=(True, False))
    with pytest.raises(ValueError, match=r"local_rope=.*fraction and the pairs"):
        dataclasses.replace(config, windows=(2, 0, 2, 0), local_rope=RopeConfig(interleaved=True))
    with pytest.raises(ValueError, match=r"pre_norm=False: needs norms after attention and MLP"):
        dataclasses.replace(config, pre_norm=False)
    rope = RopeConfig(scaling="longrope", short_factors=(1.0,), long_factors=(2.0,), original_max_len=8)
    with pytest.raises(ValueError, match=r"rope\.short_factors=\(1\.0,\): must be \d+ numbers"):
        dataclasses.replace(config, rope=rope)
    with pytest.raises(ValueError, match=r"rope\.long_factors=\(0\.0,\): must be positive numbers"):
        RopeConfig(scaling="longrope", short_factors=(1.0,), long_factors=(0.0,), original_max_len=8)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in sorted(GOLDEN)]
)
def test_stacked_layers_slices_costs_and_files_are_those_of_the_model(name: str) -> None:
    config, params = hf.load(FOLDER / name)
    tokens = random_ids(config.vocab_size)
    ours = our_logits(config, params, tokens)
    assert relative_error(our_logits(config, stack_layers(params), tokens), ours) < 1e-5

    held = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(abstract_params(config))))
    assert model_cost(config).parameters == held

    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    shardings = param_shardings(config, make_mesh())
    assert jax.tree.structure(shardings) == jax.tree.structure(params)

    heads = 1.0 if config.qk_norm_whole or config.group_size == 1 else 0.5
    subnet = Subnet.uniform(config, mlp=0.5, heads=heads, d_model=0.5)
    sliced = our_logits(*slice_params(config, params, subnet), tokens)
    assert relative_error(our_logits(*mask_params(config, params, subnet), tokens), sliced) < 1e-5


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(("text_type", "stem"), [("gemma3_text", "Gemma3"), ("ministral3", "Mistral3")])
def test_the_text_of_a_folder_with_images_is_read(text_type: str, stem: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = random_model(text_type, {}).config.to_dict() | {"final_logit_softcapping": None}
    vision = {"image_size": 28, "patch_size": 14, **VISION}
    vision |= {"model_type": "pixtral"} if stem == "Mistral3" else {}
    config = getattr(transformers, f"{stem}Config")(
        text_config=text, vision_config=vision, eos_token_id=[3, 4]
    )
    model = getattr(transformers, f"{stem}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25)
    model.save_pretrained(tmp_path / "whole")

    with pytest.warns(UserWarning, match=r"the text part is loaded; \d+ tensors of other parts"):
        config, params = hf.load(tmp_path / "whole")
    assert config.family == text_type
    tokens = random_ids(config.vocab_size)
    assert relative_error(our_logits(config, params, tokens), their_logits(model, tokens)) < TOLERANCE
    back = export_and_reload(config, params, tmp_path / "text")
    assert relative_error(their_logits(back, tokens), their_logits(model, tokens)) < 1e-6


OLD_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text": (
        "gemma3_text",
        {
            "rope_theta": 700.0,
            "rope_local_base_freq": 30.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 2,
        },
    ),
    "olmo3": (
        "olmo3",
        {
            "rope_theta": 700.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.2,
            },
        },
    ),
    "cohere2": ("cohere2", {"rope_theta": 700.0, "sliding_window_pattern": 3}),
    "phi3": (
        "phi3",
        {
            "rope_theta": 700.0,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 2.0, 3.0],
                "long_factor": [2.0, 4.0, 8.0],
            },
            "original_max_position_embeddings": 8,
        },
    ),
    "smollm3": ("smollm3", {"rope_theta": 700.0, "no_rope_layers": None, "no_rope_layer_interval": 2}),
}


@pytest.mark.parametrize("name", sorted(OLD_FILES))
def test_files_in_the_style_of_transformers_4(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from hf_models import load_theirs

    model_type, old = OLD_FILES[name]
    random_model(model_type, {}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        entries.pop(key, None)
    path.write_text(json.dumps({**entries, **old}))
    tokens = random_ids(48)
    theirs = their_logits(load_theirs(tmp_path), tokens)
    assert relative_error(our_logits(*hf.load(tmp_path), tokens), theirs) < TOLERANCE


def test_a_checkpoint_under_a_false_type_is_refused() -> None:
    """An edited model_type would load the weights and compute something else."""
    beside = {"layer_types": ["full_attention"] * 3, "use_sliding_window": False, "sliding_window": None}
    for name, key, changes in (
        ("smollm3", "no_rope_layer_interval", beside),
        ("granite", "attention_multiplier", {}),
        ("seed_oss", "attention_out_bias", {"attention_out_bias": True}),
    ):
        entries = json.loads((FOLDER / name / "config.json").read_text())
        with pytest.raises(ValueError, match=rf"^{key}=.*'llama' does not read this key here, and it may"):
            hf.config_from_hf(entries | changes | {"model_type": "llama"})


@pytest.mark.parametrize(
    "extra",
    [
        {"_name_or_path": "x", "transformers_version": "4.0", "auto_map": {"AutoConfig": "x.Y"}},
        {"unsloth_fixed": True, "transformers.js_config": {"dtype": "q4"}, "attention_dropout": 0.1},
        {"clip_qkv": None, "qk_layernorm": False, "pruned_heads": {}, "rope_interleaved": False},
        {
            "residual_multiplier": 1.0,
            "pretraining_tp": 2,
            "use_cache": False,
            "task_specific_params": {"a": 1},
        },
    ],
)
def test_keys_that_change_nothing_pass(extra: dict[str, Any]) -> None:
    for name in ("llama", "gpt2", "gemma2"):
        entries = json.loads((FOLDER / name / "config.json").read_text())
        assert hf.config_from_hf(entries | extra) == hf.config_from_hf(entries)


def test_relatives_are_of_types_that_are_supported_and_are_not_so_themselves() -> None:
    for name, (closest, besides) in RELATIVES.items():
        assert name not in hf.FAMILIES
        assert closest in hf.FAMILIES
        with pytest.raises(ValueError, match=rf"closest is '{closest}', which has no {besides}\. Supported"):
            hf.config_from_hf({"model_type": name})


def test_granite_keeps_the_numbers_of_its_file(tmp_path: Path) -> None:
    entries = json.loads((FOLDER / "granite" / "config.json").read_text())
    for divisor in (1.0, 8.0, 13.0, 1.7, 0.3):
        config = hf.config_from_hf(entries | {"logits_scaling": divisor})
        assert hf.config_to_hf(config)["logits_scaling"] == divisor
    assert_same_model((config, {}), (hf.config_from_hf(hf.config_to_hf(config)), {}))


def test_heads_of_another_width_are_refused_where_transformers_has_none() -> None:
    for name in ("helium", "phi3", "cohere2"):
        config = hf.config_from_hf(json.loads((FOLDER / name / "config.json").read_text()))
        with pytest.raises(ValueError, match="head_dim"):
            hf.config_to_hf(dataclasses.replace(config, head_dim=12, rope=wider(config.rope)))


def wider(rope: RopeConfig) -> RopeConfig:
    """The rotation of heads that are 12 wide."""
    if rope.scaling != "longrope":
        return rope
    return dataclasses.replace(rope, short_factors=(1.0,) * 4, long_factors=(2.0,) * 4)

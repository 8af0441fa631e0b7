"""Uniform slices are ordinary Hugging Face models; slices of many sizes are refused by name."""

import dataclasses
from pathlib import Path

import pytest
from hf_models import (
    GOLDEN,
    TOLERANCE,
    assert_same_model,
    export_and_reload,
    our_logits,
    random_ids,
    random_params,
    relative_error,
    their_logits,
)

from elastic_lm import hf
from elastic_lm.config.subnet import Subnet
from elastic_lm.width.slicing import mask_params, slice_params

FOLDER = Path(__file__).parents[1] / "golden" / "hf"

# Families whose head width does not follow from the model's can be cut in every direction.
CUTS = {name: {"mlp": 0.4, "heads": 0.5, "groups": 0.5} for name in GOLDEN}
FOLLOWS = ("gpt2", "gpt_neox", "phi3", "cohere2", "helium")
FOLLOWS += ("falcon", "gpt_bigcode", "gpt_neo", "gptj", "opt", "phi", "stablelm", "starcoder2")
TOGETHER = ("olmo2", "olmo3")  # whose heads are normalised together
CUTS |= {name: {"mlp": 0.4} for name in (*FOLLOWS, *TOGETHER)}
CUTS["bloom"] = {"depth": 0.5}  # whose MLP is always four times as wide as the model
WIDTHS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "nemotron"), 0.5)  # of the model


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_transformers_computes_what_the_slice_computes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config, params = hf.load(FOLDER / name)
    config = dataclasses.replace(config, elastic_groups=8)
    subnet = Subnet.uniform(config, **CUTS[name], d_model=WIDTHS.get(name, 1.0))
    small, cut = slice_params(config, params, subnet)
    tokens = random_ids(config.vocab_size)
    theirs = their_logits(export_and_reload(small, cut, tmp_path / "slice"), tokens)
    assert relative_error(our_logits(small, cut, tokens), theirs) < TOLERANCE


def test_a_folder_remembers_the_order_of_neurons(tmp_path: Path) -> None:
    config, params = hf.load(FOLDER / "llama")
    ranked = dataclasses.replace(config, elastic_groups=8)
    hf.export(ranked, params, tmp_path / "ranked")
    assert_same_model((ranked, params), hf.load(tmp_path / "ranked"))


def test_layers_of_many_sizes_are_refused_by_name_and_exported_with_zeros(tmp_path: Path) -> None:
    config, params = hf.load(FOLDER / "llama")
    subnet = Subnet((0, 1), (24, 40), (1, 2), (2, 2), 32)
    mixed = slice_params(config, params, subnet)
    sizes = r"layers 0: d_mlp=24, n_heads=2, n_kv_heads=2; layers 1: d_mlp=40, n_heads=4, n_kv_heads=2\)"
    fix = "every layer of a llama model the same: export a uniform subnet, or what slicing.mask_params"
    with pytest.raises(ValueError, match=rf"layers differ in size \({sizes}.*{fix}"):
        hf.export(*mixed, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    tokens = random_ids(config.vocab_size)
    masked = mask_params(config, params, subnet)
    theirs = their_logits(export_and_reload(*masked, tmp_path / "masked"), tokens)
    assert relative_error(our_logits(*mixed, tokens), theirs) < TOLERANCE


def test_a_family_without_head_dim_says_so(tmp_path: Path) -> None:
    config, params = hf.load(FOLDER / "gpt2")
    small, cut = slice_params(config, params, Subnet.uniform(config, groups=0.5))
    with pytest.raises(ValueError, match=r"family='gpt2' cannot express.*head_dim=8"):
        hf.export(small, cut, tmp_path / "small")
    masked = dataclasses.replace(config, norm_width=16)
    with pytest.raises(ValueError, match="norm_width=16"):
        hf.export(masked, random_params(masked), tmp_path / "masked")

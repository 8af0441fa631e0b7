"""GGUF files give the models that they were made from, as transformers and llama.cpp read them."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import gguf_files
import jax
import numpy as np
import pytest
from hf_models import GOLDEN, random_model

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.bench import llama_cpp
from elastic_lm.cli.main import main
from elastic_lm.hf.gguf import GGUFTensors
from elastic_lm.testing import random_params, tiny_config

pytest.importorskip("gguf")

TEXT = "a good film, 12 bad\nfilms;  don't: größe"
WORDS = ("▁a", "▁good", "▁film", "▁bad", "s", ",", "0", "1", "2")
ROPE = {"rope_type": "default", "rope_theta": 500.0}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": ROPE, "rms_norm_eps": 1e-5},
    "qwen2": {"use_sliding_window": False, "rope_parameters": ROPE},
    "qwen3": {"rope_parameters": ROPE, "head_dim": 128},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "rope_parameters": ROPE},
    "gemma": {"head_dim": 8, "rope_parameters": ROPE},
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention"] * 2,
        "final_logit_softcapping": None,
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 10000.0}},
    },
}
CASES = {name: case for name, case in CASES.items() if name in hf.FAMILIES}


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """Parameters by name, a tied head left out, as converters do."""
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def vocabulary(size: int) -> dict[str, Any]:
    """A tokenizer of so many tokens, all of them letters."""
    return gguf_files.byte_level({chr(0x100 + i): i for i in range(size - 4)}, [], "gpt-2")


@pytest.fixture(scope="module")
def bpe() -> dict[str, Any]:
    """Tokens and merges of a tokenizer that has learned from a file of code."""
    tokenizer = el.data.train_bpe([Path(gguf_files.__file__).read_text()], 400)
    model = json.loads(tokenizer.backend.to_str())["model"]
    end = len(model["vocab"])
    return {"tokens": {t: i if i else end for t, i in model["vocab"].items()}, "merges": model["merges"]}


def test_a_file_of_ours_comes_back(tmp_path):
    config = dataclasses.replace(tiny_config(), bos_id=None, eos_ids=())
    params = random_params(config)
    llama_cpp.write_gguf(config, params, tmp_path / "model.gguf")
    model, found = el.load(tmp_path / "model.gguf")
    assert model.config == config
    el.testing.assert_same_tree(found, params)


@pytest.mark.parametrize("name", CASES)
def test_files_give_what_the_folder_gives_and_transformers_reads(name, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = random_model(name, {**CASES[name], "eos_token_id": 45})
    model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    path = tmp_path / "model.gguf"
    architecture = name.removesuffix("_text")
    gguf_files.write(path, architecture, weights_of(model), config, vocabulary(config["vocab_size"]))

    due, due_params = hf.load(tmp_path / "hf")
    found, params = hf.load(path)
    assert found == dataclasses.replace(due, bos_id=44, eos_ids=(45, 46), windows=found.windows)
    assert [found.window(i) for i in range(found.n_layers)] == [due.window(i) for i in range(due.n_layers)]
    exact = architecture not in gguf_files.SHIFTED  # 1 was added, and is taken away again
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(due_params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=0 if exact else 3e-7)

    if architecture == "gemma":  # which transformers does not read from GGUF files
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    tensors = GGUFTensors(path)
    for key, value in weights_of(theirs).items():
        np.testing.assert_array_equal(tensors.read(key), value, err_msg=key)
    if name == "llama":
        import torch

        prompt = [1, 2, 3, 4]
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        ours = el.Sampler(el.Decoder(found), params).sample(prompt, 8, ignore_eos=True)
        assert ids[0, 4:].tolist() == list(ours.tokens)


def test_half_and_quantised_tensors_are_read_as_transformers_does(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_key_value_heads": 4}
    model = random_model("llama", {**CASES["llama"], **sizes, "head_dim": 64})
    kinds = {
        "embed": "F16",
        "lm_head": "BF16",
        "q_proj": "Q8_0",
        "k_proj": "Q4_0",
        "v_proj": "Q5_1",
        "o_proj": "Q4_1",
        "gate_proj": "Q4_K",
        "down_proj": "Q6_K",
        "up_proj": "Q5_0",
    }
    path = tmp_path / "model.gguf"
    config = model.config.to_dict()
    gguf_files.write(path, "llama", weights_of(model), config, vocabulary(48), kinds=kinds)
    with pytest.warns(UserWarning, match=r"tensors \(.*1 of Q4_K.*\) are dequantised to float32"):
        found, _ = hf.load(path)
    assert found.param_dtype == "float32"

    read = transformers.AutoModelForCausalLM.from_pretrained
    theirs = read(tmp_path, gguf_file=path.name, dtype=torch.float32)
    tensors = GGUFTensors(path)
    for key, value in weights_of(theirs).items():
        ours = tensors.read(key).astype(np.float32)
        assert np.ptp(ours) > 0
        np.testing.assert_array_equal(ours, value, err_msg=key)


def test_the_rotary_embedding_of_llama_3_is_recovered(tmp_path):
    rope = GOLDEN["llama"]["rope_parameters"] | {"original_max_position_embeddings": 2048}
    model = random_model("llama", {"rope_parameters": rope, "head_dim": 32})
    path = tmp_path / "model.gguf"
    gguf_files.write(path, "llama", weights_of(model), model.config.to_dict(), vocabulary(48))
    model.save_pretrained(tmp_path / "hf")
    due, found = hf.load(tmp_path / "hf")[0].rope, hf.load(path)[0].rope
    assert found == due
    assert found.scaling == "llama3"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_tokenizers_give_the_ids_of_transformers(pre, bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model("llama", {**CASES["llama"], "vocab_size": len(bpe["tokens"]) + 4})
    metadata = gguf_files.byte_level(**bpe, pre=pre)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, "llama", weights_of(model), model.config.to_dict(), metadata)

    ours = el.Tokenizer.load(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in (TEXT, "<s>a<|turn|> <think>b</s>", Path(gguf_files.__file__).read_text()[:3000], " \n\n  x"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode(text), special=True) == text
    starts = pre in ("llama-bpe", "tekken")
    assert ours.encode("a", bos=True)[0] == (len(bpe["tokens"]) if starts else ours.encode("a")[0])
    assert ours.eos_ids == (len(bpe["tokens"]) + 1, len(bpe["tokens"]) + 2)
    assert ours.special_tokens == ("<s>", "</s>", "<|turn|>")


def test_digits_are_single_tokens_after_any_space(bpe, tmp_path):
    """llama.cpp cuts every digit off before it looks at spaces; transformers 5.23 does not."""
    tokenizer = {}
    for pre in ("smollm", "gpt-2"):
        model = random_model("llama", {**CASES["llama"], "vocab_size": len(bpe["tokens"]) + 4})
        metadata = gguf_files.byte_level(**bpe, pre=pre)
        path = tmp_path / f"{pre}.gguf"
        gguf_files.write(path, "llama", weights_of(model), model.config.to_dict(), metadata)
        tokenizer[pre] = el.Tokenizer.load(path)
    pieces = {pre: [one.decode([i]) for i in one.encode("  12")] for pre, one in tokenizer.items()}
    assert pieces["smollm"] == ["  ", "1", "2"]
    assert pieces["gpt-2"] == [" ", " ", "1", "2"]


def default_pieces(text: str) -> list[str]:
    """Text cut as llama.cpp does without a name for it: by four patterns, each within the pieces so far."""
    regex = pytest.importorskip("regex")
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    pieces = [text]
    for pattern in (r"[\p{P}\$\+<=>\^~\|]+", words, r"\p{N}+", r"[0-9][0-9][0-9]"):
        cut = []
        for piece in pieces:
            at = 0
            for found in regex.finditer(pattern, piece):
                cut += [piece[at : found.start()], found.group()]
                at = found.end()
            cut.append(piece[at:])
        pieces = [piece for piece in cut if piece]
    return pieces


@pytest.mark.parametrize("pre", ["default", None])
def test_text_is_cut_as_llama_cpp_does_where_a_file_does_not_say_how(pre, bpe, tmp_path):
    model = random_model("llama", {**CASES["llama"], "vocab_size": len(bpe["tokens"]) + 4})
    metadata = gguf_files.byte_level(**bpe, pre=pre)
    metadata = {key: value for key, value in metadata.items() if value is not None}
    path = tmp_path / "model.gguf"
    gguf_files.write(path, "llama", weights_of(model), model.config.to_dict(), metadata)
    if pre is None:
        with pytest.warns(
            UserWarning, match=r"does not say how its tokenizer cuts text \(tokenizer.ggml.pre"
        ):
            ours = el.Tokenizer.load(path)
    else:
        ours = el.Tokenizer.load(path)
    texts = (
        TEXT,
        "don't  1234567 a12345 (x)==~y ...\n\n  z\t.  ",
        Path(gguf_files.__file__).read_text()[:5000],
    )
    for text in texts:
        found = [text[a:b] for _, (a, b) in ours.backend.pre_tokenizer.pre_tokenize_str(text)]
        assert found == default_pieces(text)
        assert ours.decode(ours.encode(text), special=True) == text


def test_sentencepiece_tokenizers_give_the_ids_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    metadata = gguf_files.sentencepiece(WORDS)
    model = random_model("llama", {**CASES["llama"], "vocab_size": len(metadata["tokens"])})
    path = tmp_path / "model.gguf"
    gguf_files.write(path, "llama", weights_of(model), model.config.to_dict(), metadata)
    ours = el.Tokenizer.load(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in (TEXT, "a good film", " a  bad", "<s>good</s> film", "é🙂"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.encode("a good film", bos=True) == theirs.encode("a good film")
    assert ours.encode("a good film") == [metadata["tokens"].index(w) for w in ("▁a", "▁good", "▁film")]
    assert ours.decode(ours.encode("a good film é")) == "a good film é"
    assert ours.eos_ids == (2,)


def test_convert_keeps_tokenizer_and_template(bpe, tmp_path, capsys):
    model = random_model("llama", {**CASES["llama"], "vocab_size": len(bpe["tokens"]) + 4})
    path = tmp_path / "model.gguf"
    metadata = gguf_files.byte_level(**bpe, pre="qwen2")
    gguf_files.write(path, "llama", weights_of(model), model.config.to_dict(), metadata)
    assert main(["convert", "--from", str(path), "--to", str(tmp_path / "ck")]) == 0
    assert "llama, 2 layers" in capsys.readouterr().out
    assert (tmp_path / "ck" / "chat_template.jinja").read_text() == gguf_files.TEMPLATE
    el.testing.assert_same_tree(el.load(tmp_path / "ck")[1], el.load(path)[1])
    assert el.Tokenizer.load(tmp_path / "ck").fingerprint == el.Tokenizer.load(path).fingerprint
    assert main(["export", "--from", str(path), "--to", str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [401, 402]


def refused(path, match, read=el.load, **how):
    model = random_model("llama", CASES["llama"])
    tokenizer = vocabulary(48) | how.pop("tokenizer", {})
    gguf_files.write(path, "llama", weights_of(model), model.config.to_dict(), tokenizer, **how)
    with pytest.raises(ValueError, match=match) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_what_is_not_understood_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    refused(path, r"llama.expert_count=4: is not known here", more={"expert_count": 4})
    refused(path, r"llama.attention.sliding_window=8: is not known", more={"attention.sliding_window": 8})
    refused(path, r"rope.scaling.type='longrope': must be linear", more={"rope.scaling.type": "longrope"})
    refused(
        path, r"tokenizer.ggml.pre='odd': it is not known how", el.Tokenizer.load, tokenizer={"pre": "odd"}
    )
    refused(path, r"tokenizer.ggml.model='rwkv': is not read", el.Tokenizer.load, tokenizer={"model": "rwkv"})

    refused(path, r"is one of 3 files that a model was split into; join", general={"split.count": 3})
    refused(path, r"is no GGUF file that can be read \(", general={"general.alignment": 0})

    model = random_model("llama", CASES["llama"])
    gguf_files.write(path, "llama", weights_of(model), model.config.to_dict(), vocabulary(48))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no GGUF file that can be read"):
        el.load(path)
    path.write_bytes(b"no GGUF at all")
    with pytest.raises(ValueError, match="is no GGUF file that can be read"):
        el.load(path)

    real = importlib.import_module

    def without_gguf(name: str) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without_gguf)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"pip install 'elastic-lm\[gguf\]'"):
        el.load(path)

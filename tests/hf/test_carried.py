"""What an export says again of the folder that its model came from."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers

from elastic_lm import hf, testing
from elastic_lm.checkpoints import native
from elastic_lm.cli import main
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.hf.carried import Carried

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CONFIG = testing.tiny_config(n_layers=2, vocab_size=300)
FURTHER = {
    "dtype": "float32",
    "initializer_range": 0.5,
    "pad_token_id": 3,
    "use_cache": False,
    "_layer_notes": [1.0, 2.0],  # an item per layer
}
GENERATION = {"do_sample": True, "temperature": 0.7, "eos_token_id": [1], "transformers_version": "5.0"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Hugging Face folder of a chat model, with more in its files than this package writes."""
    folder = tmp_path / "source"
    config = dataclasses.replace(CONFIG, eos_ids=(1,))
    hf.export(config, testing.random_params(config), folder, chat_tokenizer())
    values = json.loads((folder / "config.json").read_text())
    del values["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(values | FURTHER))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|im_end|>", "padding_side": "left", "unk_token": "<|endoftext|>"}
    settings |= {"additional_special_tokens": ["<|im_start|>"], "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "checksums.json").unlink()  # as of somebody else's folder
    return folder


def chat_tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(train_bpe(["user assistant hello"], 265).backend.to_str())
    backend.add_special_tokens(["<|im_end|>"])
    return Tokenizer(backend, None, (1,))


def test_a_folder_comes_back_with_all_its_keys(source: Path, tmp_path: Path) -> None:
    checkpoint, target = tmp_path / "checkpoint", tmp_path / "target"
    for _ in range(2):  # the second time over what the first one wrote
        assert main.main(["convert", "--from", str(source), "--to", str(checkpoint), "--overwrite"]) == 0
        assert main.main(["export", "--from", str(checkpoint), "--to", str(target), "--overwrite"]) == 0
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        was, now = (json.loads((folder / name).read_text()) for folder in (source, target))
        assert {key: now.get(key, "missing") for key in was} == was, name
    assert "torch_dtype" not in json.loads((target / "config.json").read_text())
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert Tokenizer.load(checkpoint).eos_ids == Tokenizer.load(source).eos_ids == (1,)


def test_the_model_wins_over_what_it_came_from(source: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, n_layers=1, eos_ids=(5, 6))
    with pytest.warns(UserWarning, match="_layer_notes of the source would change the exported model"):
        hf.export(config, testing.random_params(config), tmp_path / "target", source=source)
    found = json.loads((tmp_path / "target" / "config.json").read_text())
    assert (found["num_hidden_layers"], found["initializer_range"]) == (1, 0.5)
    assert "_layer_notes" not in found
    generation = json.loads((tmp_path / "target" / "generation_config.json").read_text())
    assert generation == GENERATION | {"eos_token_id": [5, 6]}
    assert hf.load(tmp_path / "target")[0].eos_ids == (5, 6)


def test_another_family_takes_nothing_along(source: Path) -> None:
    entries = {"model_type": "qwen2"}
    assert Carried.of_folder(source).with_entries(CONFIG, entries) == entries
    assert Carried({}, None).with_ids({"eos_token_id": 1, "vocab_size": 3}) == {"eos_token_id": 1}


def test_code_and_exits_of_the_source_stay_there(source: Path) -> None:
    carried = Carried(Carried.of_folder(source).config | {"auto_map": {"A": "a.py"}, "elastic": {}}, None)
    entries = hf.config_to_hf(CONFIG)
    found = carried.with_entries(CONFIG, entries)
    assert not {"auto_map", "elastic"} & set(found)


def test_checkpoints_keep_it_and_are_replaced_with_it(source: Path, tmp_path: Path) -> None:
    params = testing.random_params(CONFIG)
    for _ in range(2):
        native.save_model(
            tmp_path / "saved", CONFIG, params, Tokenizer.load(source), source=source, overwrite=True
        )
    assert Carried.of_folder(tmp_path / "saved") == Carried.of_folder(source)


@pytest.mark.long
def test_transformers_does_with_an_export_what_it_does_with_the_original(
    source: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    checkpoint, target = tmp_path / "checkpoint", tmp_path / "target"
    assert main.main(["convert", "--from", str(source), "--to", str(checkpoint)]) == 0
    assert main.main(["export", "--from", str(checkpoint), "--to", str(target)]) == 0

    theirs, ours = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, target))
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "é <|im_end|> 漢字"}]
    for how in ({"tokenize": False}, {"return_dict": False}):
        assert ours.apply_chat_template(chat, **how) == theirs.apply_chat_template(chat, **how)
    text = theirs.apply_chat_template(chat, tokenize=False)
    assert ours(text).input_ids == theirs(text).input_ids == Tokenizer.load(target).encode(text)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert (ours.padding_side, ours.model_max_length) == ("left", 77)

    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (source, target)]
    was, now = (model.generation_config.to_dict() for model in models)
    assert now == was
    ids = torch.tensor([theirs("hello").input_ids])
    drawn = [
        (torch.manual_seed(0), model.generate(ids, max_new_tokens=8, pad_token_id=0).tolist())[1]
        for model in models
    ]
    assert drawn[0] == drawn[1]

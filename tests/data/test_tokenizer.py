"""Byte-level BPE and the ids that begin and end a text."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors

from elastic_lm.data.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

TEXT = ["def f(x):\n    return x + 1\n", "class A:\n    def g(self):\n        return self\n"] * 5


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return train_bpe(TEXT, 280)


def test_any_text_survives(learned: Tokenizer) -> None:
    for text in ("def f(x):\n\treturn 1\n", "żółć 漢字 🙂\x00\r\n", "", " ", "  \n "):
        assert learned.decode(learned.encode(text)) == text


def test_learning_is_repeatable(learned: Tokenizer) -> None:
    assert train_bpe(TEXT, 280).backend.to_str() == learned.backend.to_str()
    assert learned.vocab_size == 280


def test_end_of_text_is_id_zero_and_not_text(learned: Tokenizer) -> None:
    assert learned.eos_ids == (0,)
    assert learned.bos_id is None
    assert learned.decode([0, *learned.encode("def")]) == "def"


def test_saved_and_loaded_is_the_same(learned: Tokenizer, tmp_path: Path) -> None:
    learned.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert (loaded.bos_id, loaded.eos_ids, loaded.vocab_size) == (None, (0,), 280)
        assert loaded.encode(TEXT[0]) == learned.encode(TEXT[0])


def test_a_template_that_prepends_gives_bos(learned: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(learned.backend.to_str())
    backend.add_special_tokens(["<s>"])
    begin = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 5, "eos_token_id": [3, 4]}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_ids) == (begin, (3, 4))
    assert loaded.encode("x", bos=True) == [begin, *loaded.encode("x")]
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").bos_id == begin


def test_a_bos_that_no_text_gets_is_left_out(learned: Tokenizer, tmp_path: Path) -> None:
    """GPT-2 and Pythia name a bos token in config.json that their tokenizers never add."""
    learned.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))
    assert Tokenizer.load(tmp_path).bos_id is None


def test_tokenizer_config_decides_where_config_is_silent(learned: Tokenizer, tmp_path: Path) -> None:
    learned.save(tmp_path)
    settings = {"add_bos_token": True, "bos_token": {"content": END_OF_TEXT}, "eos_token": "def"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_id == 0
    assert loaded.eos_ids == (loaded.backend.token_to_id("def"),)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="vocab_size=256"):
        train_bpe(TEXT, 256)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ['{"a": ', "[1]"])
def test_damaged_files_beside_it_are_named(
    learned: Tokenizer, tmp_path: Path, name: str, content: str
) -> None:
    learned.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        Tokenizer.load(tmp_path)


def test_end_ids_that_are_none_are_named(learned: Tokenizer, tmp_path: Path) -> None:
    learned.save(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id=\('x',\): must be a token id"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("token", [{}, 3, {"content": None}])
def test_a_token_that_is_no_text_is_named(learned: Tokenizer, tmp_path: Path, token: object) -> None:
    learned.save(tmp_path)
    for key in ("bos_token", "eos_token"):
        settings = {"add_bos_token": True, key: token}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {key}=.*must be a string"):
            Tokenizer.load(tmp_path)

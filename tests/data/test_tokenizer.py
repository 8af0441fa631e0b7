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


WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "un", "##believ", "##ably", "deep", "model", "."]


def word_pieces() -> tokenizers.Tokenizer:
    """A BERT tokenizer of a few words."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return backend


def test_pairs_are_joined_by_the_tokenizers_own_template(tmp_path: Path) -> None:
    backend = word_pieces()
    backend.enable_padding(pad_id=0)  # what a file says of padding and truncation is not applied
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.pad_id == 0
    assert tokenizer.encode_pair("Unbelievably deep.") == ([1, 4, 5, 6, 7, 9, 2], [0] * 7)
    joined = tokenizer.encode_pair("Unbelievably deep.", "model")
    assert joined == ([1, 4, 5, 6, 7, 9, 2, 8, 2], [0] * 7 + [1] * 2)
    assert tokenizer.encode_pair("Unbelievably deep.", "model", 7) == (
        [1, 4, 5, 6, 2, 8, 2],
        [0] * 5 + [1] * 2,
    )
    assert tokenizer.encode_pair("Unbelievably deep.", "model") == joined
    with pytest.raises(ValueError, match="max_len=3: must be above the 3 special tokens"):
        tokenizer.encode_pair("deep", "model", 3)
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert (again.pad_id, again.encode_pair("Unbelievably deep.", "model")) == (0, joined)


def test_pairs_of_roberta_have_one_type_and_two_separators(tmp_path: Path) -> None:
    backend = word_pieces()
    backend.post_processor = processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1), add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"pad_token_id": 3}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.pad_id == 3
    assert tokenizer.encode_pair("deep", "model") == ([1, 7, 2, 2, 8, 2], [0] * 6)
    (tmp_path / "config.json").write_text('{"pad_token_id": -1}')  # old configs write it for none
    assert Tokenizer.load(tmp_path).pad_id is None
    (tmp_path / "config.json").write_text('{"pad_token_id": "x"}')
    with pytest.raises(ValueError, match=r"config\.json: pad_token_id='x': must be a token id"):
        Tokenizer.load(tmp_path)

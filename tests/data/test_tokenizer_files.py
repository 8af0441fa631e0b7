"""Special tokens that stand beside tokenizer.json, chat templates, spaces, and bytes that are cut in two."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.decode.results import Detokenizer, held_back

FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return train_bpe(["alpha beta gamma <|im_end|>"] * 3, 270)


def folder(path: Path, tokenizer: Tokenizer, files: dict[str, Any]) -> Path:
    """A folder with the tokenizer, and other files beside it than those that it is saved with."""
    tokenizer.save(path)
    (path / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


NAMED = {
    "decoder": {
        "tokenizer_config.json": {"added_tokens_decoder": {"270": {"content": "<|im_end|>"} | FLAGS}}
    },
    "role": {"tokenizer_config.json": {"eos_token": "<|im_end|>"}},
    "own role": {"tokenizer_config.json": {"turn_token": "<|im_end|>"}},
    "further": {"tokenizer_config.json": {"additional_special_tokens": ["<|im_end|>"]}},
    "extra": {"tokenizer_config.json": {"extra_special_tokens": {"turn": "<|im_end|>"}}},
    "map": {"special_tokens_map.json": {"pad_token": {"content": "<|im_end|>"} | FLAGS}},
    "added": {"added_tokens.json": {"<|im_end|>": 270}},
}


@pytest.mark.parametrize("files", NAMED.values(), ids=NAMED)
def test_tokens_that_only_other_files_name_are_one_token(
    learned: Tokenizer, tmp_path: Path, files: dict[str, Any]
) -> None:
    loaded = Tokenizer.load(folder(tmp_path / "a", learned, files))
    assert learned.backend.token_to_id("<|im_end|>") is None
    assert loaded.encode("<|im_end|>a") == [270, *learned.encode("a")]
    special = "added_tokens.json" not in files
    assert loaded.decode([270]) == ("" if special else "<|im_end|>")
    assert loaded.decode([270], special=True) == "<|im_end|>"
    loaded.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert (again.encode("<|im_end|>a"), again.eos_ids) == (loaded.encode("<|im_end|>a"), loaded.eos_ids)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"added_tokens.json": {"<a>": 290}},
            r"added_tokens\.json: the token '<a>' has the id 290 there, and 270",
        ),
        ({"added_tokens.json": {"<a>": "x"}}, r"added_tokens\.json: the id 'x' of an added token"),
        ({"added_tokens.json": "["}, r"added_tokens\.json: not valid JSON"),
        (
            {"tokenizer_config.json": {"extra_special_tokens": "<a>"}},
            "extra_special_tokens='<a>': must be a list",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"270": "<a>"[:0]}}}, "added_tokens_decoder=''"),
    ],
)
def test_names_that_mean_nothing_are_refused(
    learned: Tokenizer, tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(folder(tmp_path, learned, files))


def test_all_files_are_written_again(learned: Tokenizer, tmp_path: Path) -> None:
    files = {
        "tokenizer_config.json": {
            "chat_template": TEMPLATE,
            "padding_side": "left",
            "unk_token": "<|endoftext|>",
        },
        "special_tokens_map.json": {"unk_token": "<|endoftext|>"},
        "added_tokens.json": {"<|im_end|>": 270},
        "chat_template.jinja": TEMPLATE,
        "additional_chat_templates/tool.jinja": TEMPLATE,
    }
    source = folder(tmp_path / "a", learned, files)
    backend = json.loads((source / "tokenizer.json").read_text())
    backend["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (source / "tokenizer.json").write_text(json.dumps(backend))
    for target in ("b", "c"):
        Tokenizer.load(source).save(tmp_path / target)
        source = tmp_path / target
    for name in (*files, "tokenizer.json"):
        was, now = ((tmp_path / place / name).read_text() for place in ("a", "c"))
        assert (json.loads(now) == json.loads(was)) if name.endswith(".json") else now == was, name


def test_ids_of_files_that_do_not_come_along_are_kept(learned: Tokenizer, tmp_path: Path) -> None:
    config = {"eos_token": "<|endoftext|>"}
    files = {"config.json": {"eos_token_id": [7, 8], "pad_token_id": 9}, "tokenizer_config.json": config}
    loaded = Tokenizer.load(folder(tmp_path / "a", learned, files))
    loaded.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert (again.eos_ids, again.pad_id) == ((7, 8), 9)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps(files["config.json"]))
    again.save(tmp_path / "c")
    assert json.loads((tmp_path / "c" / "tokenizer_config.json").read_text()) == config


def test_a_tokenizer_that_was_changed_is_written_as_it_is(learned: Tokenizer, tmp_path: Path) -> None:
    learned.save(tmp_path / "a")
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.backend.add_tokens(["<new>"])
    loaded.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").encode("<new>") == [270]


def test_a_prefix_space_is_read_as_the_class_does(learned: Tokenizer, tmp_path: Path) -> None:
    def ids(name: str, **settings: object) -> list[int]:
        config = {"tokenizer_class": name, **settings}
        files = {"tokenizer_config.json": config}
        return Tokenizer.load(folder(tmp_path, learned, files)).encode("alpha")

    plain, spaced = learned.encode("alpha"), learned.encode(" alpha")
    assert ids("GPT2Tokenizer") == plain != spaced
    assert ids("GPT2TokenizerFast", add_prefix_space=True) == spaced
    assert ids("PreTrainedTokenizerFast", add_prefix_space=True) == plain


def byte_fallback(path: Path, config: dict[str, Any]) -> Tokenizer:
    """A tokenizer like Llama 2's, whose words are letters."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(path)


def test_legacy_decides_about_spaces_after_special_tokens(tmp_path: Path) -> None:
    a, spaced, space, end = 260, 262, 259, 2
    for settings, wanted in (
        ({}, [spaced, end, a]),
        ({"legacy": True}, [spaced, end, spaced]),
        ({"legacy": False}, [spaced, end, a]),
        ({"add_prefix_space": False}, [a, end, a]),
    ):
        config = {"tokenizer_class": "LlamaTokenizer", **settings}
        tokenizer = byte_fallback(tmp_path, config)
        assert tokenizer.encode("a</s>a") == wanted, settings
        assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    assert space not in tokenizer.encode("a")
    assert isinstance(tokenizer.backend.pre_tokenizer, pre_tokenizers.Metaspace)


def test_characters_cut_in_two_leave_their_neighbours_alone(tmp_path: Path) -> None:
    tokenizer = byte_fallback(tmp_path, {})
    ids = [3 + byte for byte in "😀😃".encode()]
    assert tokenizer.decode(ids) == "😀😃"
    assert tokenizer.decode(ids[:6]) == "😀\ufffd"
    assert tokenizer.decode([260, *ids[:6], 261, 2, *ids[:2]]) == "a😀\ufffdb\ufffd"
    assert tokenizer.decode([262, *ids[:2], 2], special=True) == "a\ufffd</s>"
    reader = Detokenizer(tokenizer, (2,), ())
    shown = ""
    for n in range(1, 7):
        text = reader.text([1], ids[:n])
        safe = text if n == 6 else held_back(text, ())
        assert safe.startswith(shown)
        shown = safe
    assert shown == "😀\ufffd"


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"])
def test_other_formats_are_told_how_to_become_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(
        FileNotFoundError, match=rf"{name} there is in a format .*AutoTokenizer.*save_pretrained"
    ):
        Tokenizer.load(tmp_path)


def test_half_characters_are_refused_before_anything_is_done(learned: Tokenizer, tmp_path: Path) -> None:
    place = folder(tmp_path / "t", learned, {})
    (place / "tokenizer_config.json").write_text('{"note": "\\ud800"}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: holds a lone surrogate"):
        Tokenizer.load(place)
    (place / "tokenizer_config.json").write_text('{"note": "\\ud83d\\ude00"}')
    Tokenizer.load(place).save(tmp_path / "again")


def test_tokens_of_tokenizer_json_stay_special(learned: Tokenizer, tmp_path: Path) -> None:
    files = {"added_tokens.json": {"<|endoftext|>": 0, "<new>": 270}}
    loaded = Tokenizer.load(folder(tmp_path, learned, files))
    assert loaded.special_tokens == ("<|endoftext|>",)
    assert loaded.encode("<new>") == [270]


def test_tokens_with_a_role_are_special(learned: Tokenizer, tmp_path: Path) -> None:
    entry = {"content": "<|im_end|>"} | FLAGS | {"special": False}
    config = {"added_tokens_decoder": {"270": entry}, "eos_token": "<|im_end|>"}
    loaded = Tokenizer.load(folder(tmp_path, learned, {"tokenizer_config.json": config}))
    assert loaded.special_tokens == ("<|endoftext|>", "<|im_end|>")


@pytest.mark.parametrize("none", ["", {"content": ""}])
def test_an_empty_token_is_none(learned: Tokenizer, tmp_path: Path, none: object) -> None:
    config = {"bos_token": none, "pad_token": none, "add_bos_token": True}
    files = {"tokenizer_config.json": config, "special_tokens_map.json": {"unk_token": none}}
    loaded = Tokenizer.load(folder(tmp_path, learned, files))
    assert (loaded.bos_id, loaded.pad_id, loaded.vocab_size) == (None, None, 270)


def test_byte_level_tokenizers_of_llamas_class_are_left_alone(learned: Tokenizer, tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True, "legacy": True}
    loaded = Tokenizer.load(folder(tmp_path, learned, {"tokenizer_config.json": config}))
    assert loaded.encode("alpha") == learned.encode("alpha")


def test_a_template_stands_above_add_bos_token(learned: Tokenizer, tmp_path: Path) -> None:
    config = {"add_bos_token": False, "bos_token": "<|endoftext|>"}
    source = folder(tmp_path, learned, {"tokenizer_config.json": config})
    backend = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    names = [("<|endoftext|>", 0)]
    backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=names)
    backend.save(str(source / "tokenizer.json"))
    assert Tokenizer.load(source).bos_id == 0


@pytest.mark.parametrize("i", ["5.7", 5.7, True, "1e3", 1e400, 10**12, "-1"])
def test_ids_that_are_no_whole_numbers_are_refused(learned: Tokenizer, tmp_path: Path, i: object) -> None:
    with pytest.raises(ValueError, match=r"added_tokens\.json: the id .* of an added token"):
        Tokenizer.load(folder(tmp_path, learned, {"added_tokens.json": {"<a>": i}}))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (3, "elastic=3: must be a mapping"),
        ({"eos_ids": 3}, "elastic.eos_ids=3: must be a list"),
        ({"eos_ids": ["a"]}, "elastic.eos_ids=.*: must be token ids"),
        ({"pad_id": 1.5}, "elastic.pad_id=1.5: must be a token id"),
    ],
)
def test_our_own_ids_are_checked(learned: Tokenizer, tmp_path: Path, own: object, message: str) -> None:
    source = folder(tmp_path, learned, {"tokenizer_config.json": {"elastic": own}})
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        Tokenizer.load(source)


def test_minus_one_is_no_token(learned: Tokenizer, tmp_path: Path) -> None:
    files = {"config.json": {"eos_token_id": -1}, "tokenizer_config.json": {"eos_token": "<|endoftext|>"}}
    assert Tokenizer.load(folder(tmp_path, learned, files)).eos_ids == (0,)
    (tmp_path / "config.json").write_text('{"eos_token_id": [-1, 7]}')
    assert Tokenizer.load(tmp_path).eos_ids == (7,)


@pytest.mark.parametrize("i", [-1, 10**12])
def test_ids_beyond_any_vocabulary_are_refused(learned: Tokenizer, i: int) -> None:
    tokenizer = Tokenizer(learned.backend)
    tokenizer.check_vocabulary(300)
    with pytest.raises(ValueError, match=f"token None has id {i}"):
        tokenizer.check_ids([i, 3])

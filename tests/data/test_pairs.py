"""Pairs of texts: exact resume, lengths, what is learned, formats, and files that are refused."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.task import TaskConfig
from elastic_lm.data.pairs import eval_pairs, train_pairs
from elastic_lm.data.tokenizer import Tokenizer, train_bpe

MODEL = EncoderDecoderConfig(300, 32, 1, 4, 40, decoder_start_id=2, pad_id=3, eos_ids=(0,))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["one two three four"], 257)  # bytes


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"source": "x" * (i % 30), "target": str(i), "id": "0"} for i in range(90)]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config(path: Path, **fields) -> TaskConfig:
    names = {"text_field": "source", "label_field": "target", "problem": "text_to_text"}
    files = {"paths": (str(path),), "eval_paths": (str(path),)}
    return TaskConfig(**{**files, **names, "batch_size": 4, **fields})


def texts(tokenizer: Tokenizer, batch: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """The pairs of a batch, from what counts in it."""
    rows = zip(batch["source"], batch["source_mask"], batch["target"], batch["weights"], strict=True)
    return [(tokenizer.decode(s[m]), tokenizer.decode(t[w > 0])) for s, m, t, w in rows]


def assert_same(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_an_iterator_resumes_exactly(pairs: Path, tokenizer: Tokenizer) -> None:
    dataset = train_pairs(config(pairs), MODEL, tokenizer)
    for steps in (0, 1, 15, 16, 17, 40):
        batches, other = iter(dataset), iter(dataset)
        for _ in range(steps):
            next(batches)
        other.set_state(json.loads(json.dumps(batches.get_state())))
        assert_same(itertools.islice(batches, 18), itertools.islice(other, 18))


def test_the_seed_decides_about_the_order_and_every_pair_comes(pairs: Path, tokenizer: Tokenizer) -> None:
    def seen(count: int, **fields) -> list[tuple[str, str]]:
        batches = itertools.islice(iter(train_pairs(config(pairs, **fields), MODEL, tokenizer)), count)
        return [pair for batch in batches for pair in texts(tokenizer, batch)]

    assert seen(10) == seen(10)
    assert seen(10) != seen(10, seed=1)
    expected = {("x" * (i % 30), str(i)) for i in range(90)}
    assert set(seen(48)) == expected  # 192 pairs, three whole windows


def test_batches_are_padded_to_few_lengths_and_little(pairs: Path, tokenizer: Tokenizer) -> None:
    batches = list(itertools.islice(iter(train_pairs(config(pairs), MODEL, tokenizer)), 64))
    shapes = {(batch["source"].shape, batch["target"].shape) for batch in batches}
    assert {s[1] for s, _ in shapes} == {8, 16, 32}
    assert {t for _, t in shapes} == {(4, 8)}
    counted = sum(batch["source_mask"].sum() for batch in batches)
    columns = sum(batch["source"].size for batch in batches)
    assert counted / columns > 0.65  # of 32 columns each it would be half


def test_what_is_read_and_what_is_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"source": "abc", "target": "de"}))
    (batch,) = eval_pairs(config(file, batch_size=2), MODEL, tokenizer)
    source, target = tokenizer.encode("abc"), tokenizer.encode("de")
    assert batch["source"][0].tolist() == [*source, 0, 3, 3, 3, 3]
    assert batch["source_mask"].tolist() == [[True] * 4 + [False] * 4, [False] * 8]
    assert batch["target"][0].tolist() == [*target, 0, 3, 3, 3, 3, 3]
    assert batch["target_in"][0].tolist() == [2, *target, 0, 3, 3, 3, 3]
    assert batch["weights"].tolist() == [[1] * 3 + [0] * 5, [0] * 8]


def test_long_texts_are_cut_before_their_end_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"source": "a" * 50, "target": "b" * 50}))
    (batch,) = eval_pairs(config(file, max_len=20, max_target=5), MODEL, tokenizer)
    assert (batch["source"].shape, batch["target"].shape) == ((4, 20), (4, 5))
    assert texts(tokenizer, batch)[0] == ("a" * 19, "b" * 4)
    assert batch["source"][0, -1] == batch["target"][0, -1] == 0


def test_json_lines_and_csv_plain_or_packed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = '{"question": "a, \\"b\\"", "answer": "c"}\n'
    table = 'answer,question\nc,"a, ""b"""\n'
    for name, text in (("1.jsonl", lines), ("2.csv", table)):
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    fields = config(tmp_path, text_field="question", label_field="answer", prefix="q: ")
    (batch,) = eval_pairs(fields, MODEL, tokenizer)
    assert texts(tokenizer, batch) == [('q: a, "b"', "c")] * 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"source": "a"}\n', "line 1 has no text under 'target'; found: source"),
        ("x.jsonl", "{", "line 1 is not JSON"),
        ("x.csv", "source,label\na,b\n", "line 2 has no text under 'target'; found: source, label"),
        ("x.csv", "source,target\na\n", "line 2: does not have the 2 fields"),
        ("x.csv", "source,target\n", "no records in it"),
        ("x.csv", 'source,target\na,"' + "b" * 200_000 + '"\n', "line .* is not CSV: field larger"),
        ("x.csv", "", "is empty"),
    ],
)
def test_malformed_files_are_named(
    tmp_path: Path, tokenizer: Tokenizer, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"x\..*{message}"):
        next(iter(eval_pairs(config(tmp_path / name), MODEL, tokenizer)))


def test_bad_configs_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        train_pairs(config(tmp_path / "absent"), MODEL, tokenizer)
    with pytest.raises(ValueError, match=r"task\.eval_paths"):
        eval_pairs(config(tmp_path, eval_paths=()), MODEL, tokenizer)
    for fields in ({"paths": ()}, {"batch_size": 0}, {"seed": -1}, {"max_target": 0}):
        with pytest.raises(ValueError, match=f"task.{next(iter(fields))}"):
            config(tmp_path, **fields)

"""The pipeline: exact resume, packing, shifted targets, masks, and inputs that are refused."""

import gzip
import itertools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.checkpoints.native import Checkpoints
from elastic_lm.config.data import DataConfig
from elastic_lm.data import pipeline
from elastic_lm.data.sources import Document
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.train.state import abstract_state

WORDS = (
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([" ".join(WORDS) * 3], 300)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    lines = [f"{WORDS[i % 16]} {i} {WORDS[i * 7 % 16]}\n" for i in range(600)]
    file = tmp_path / "some.txt"
    file.write_text("".join(lines))
    return file


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    file = tmp_path / "some.jsonl"
    pairs = [{"prompt": f"{WORDS[i % 16]} {i}? ", "response": f"{WORDS[i * 3 % 16]}!"} for i in range(50)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


def config(path: Path, source="text", **fields) -> DataConfig:
    paths = (str(path),)
    values = {"seq_len": 16, "batch_size": 4, "span": 64, **fields}
    return DataConfig(source=source, paths=paths, eval_paths=paths, **values)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_an_iterator_resumes_exactly(text: Path, tokenizer: Tokenizer, packing) -> None:
    dataset = pipeline.train_batches(config(text, packing=packing), tokenizer)
    for steps in (0, 1, 2, 5, 20):
        batches, other = iter(dataset), iter(dataset)
        for _ in range(steps):
            next(batches)
        other.set_state(batches.get_state())
        assert_same(itertools.islice(batches, 12), itertools.islice(other, 12))


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_a_checkpoint_moves_the_iterator(text: Path, tokenizer: Tokenizer, packing, tmp_path: Path) -> None:
    """At every step, those included where a row and a document end together."""
    dataset = pipeline.train_batches(config(text, packing=packing, seq_len=3, span=8), tokenizer)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = {"x": jnp.zeros(2)}
    batches = iter(dataset)
    for step in range(12):
        other = iter(dataset)
        checkpoints.save(step, state, batches)
        restored = checkpoints.restore(abstract_state(state), other)
        assert restored is not None
        assert restored[0] == step
        assert_same([next(batches)], [next(other)])
    checkpoints.close()


def assert_same(ours, theirs) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_targets_are_the_next_tokens(text: Path, tokenizer: Tokenizer) -> None:
    for batch in pipeline.eval_batches(config(text), tokenizer):
        inside = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["segments"][:, 1:] > 0)
        np.testing.assert_array_equal(batch["targets"][:, :-1][inside], batch["tokens"][:, 1:][inside])
        np.testing.assert_array_equal((np.diff(batch["positions"]) == 1)[inside], True)
        assert (batch["positions"] < 16).all()
        starts = np.diff(batch["segments"], prepend=0) != 0
        assert (batch["positions"][starts] == 0).all()


def test_a_pass_reads_every_byte_once(text: Path, tokenizer: Tokenizer) -> None:
    """Each piece of the text gives up its first token, which nothing predicts; the file's end is one."""
    source = pipeline.documents(config(text), "test")
    pieces = [source[i] for i in range(len(source))]
    assert "".join(piece.text for piece in pieces) == text.read_text()
    expected = sum(len(tokenizer.encode(piece.text)) - 1 for piece in pieces) + 1
    counted = sum(batch["weights"].sum() for batch in pipeline.eval_batches(config(text), tokenizer))
    assert counted == expected


def test_padding_counts_nothing(text: Path, tokenizer: Tokenizer) -> None:
    batches = list(pipeline.eval_batches(config(text, packing="first_fit"), tokenizer))
    for batch in batches:
        assert (batch["weights"][batch["segments"] == 0] == 0).all()
    assert any((batch["segments"] == 0).any() for batch in batches)
    assert {batch["tokens"].shape for batch in batches} == {(4, 16)}


def test_seeds_give_different_orders_and_epochs_differ(text: Path, tokenizer: Tokenizer) -> None:
    one, two = (next(iter(pipeline.train_batches(config(text, seed=s), tokenizer))) for s in (1, 2))
    assert (one["tokens"] != two["tokens"]).any()


def test_only_the_response_is_learned(tokenizer: Tokenizer) -> None:
    document = Document("alpha beta ", "gamma delta", True, True, "here")
    row = pipeline.encode(config(Path("x"), "instruction"), tokenizer, document)
    response = [*tokenizer.encode("gamma delta"), tokenizer.eos_ids[0]]
    assert row["targets"][row["weights"] == 1].tolist() == response
    assert row["tokens"][0] == tokenizer.encode("alpha beta ")[0]
    assert row["weights"].sum() == len(response)


def test_instructions_keep_their_mask_through_packing(instructions: Path, tokenizer: Tokenizer) -> None:
    settings = config(instructions, "instruction", packing="first_fit", seq_len=48)
    responses = []
    for batch in pipeline.eval_batches(settings, tokenizer):
        for row in range(4):
            for segment in range(1, batch["segments"][row].max() + 1):
                learned = (batch["segments"][row] == segment) & (batch["weights"][row] == 1)
                responses.append(tokenizer.decode(batch["targets"][row][learned]))
    expected = [json.loads(line)["response"] for line in instructions.read_text().splitlines()]
    assert sorted(responses) == sorted(expected)


def test_long_instructions_are_cut_to_a_row(tokenizer: Tokenizer) -> None:
    document = Document("alpha " * 40, "beta", True, True, "here")
    settings = config(Path("x"), "instruction", packing="first_fit")
    assert len(pipeline.encode(settings, tokenizer, document)["tokens"]) == 16


def test_a_bos_token_goes_where_a_document_begins(tokenizer: Tokenizer) -> None:
    with_bos = Tokenizer(tokenizer.backend, bos_id=7, eos_ids=(0,))
    first = pipeline.encode(config(Path("x")), with_bos, Document("", "alpha", True, False, "here"))
    later = pipeline.encode(config(Path("x")), with_bos, Document("", "alpha beta", False, True, "here"))
    assert first["tokens"][0] == 7
    assert first["targets"].tolist() == tokenizer.encode("alpha")
    assert later["tokens"][0] != 7
    assert later["targets"][-1] == 0


def test_packed_files_read_like_plain_ones(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    packed = tmp_path / "some.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    plain, unpacked = (list(pipeline.eval_batches(config(p), tokenizer)) for p in (text, packed))
    assert_same(plain, unpacked)


def refused(path: Path, source: str, tokenizer: Tokenizer, error, match: str) -> None:
    with pytest.raises(error, match=match):
        list(pipeline.eval_batches(config(path, source), tokenizer))


def test_bad_inputs_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    refused(tmp_path / "none.txt", "text", tokenizer, FileNotFoundError, "none.txt: does not exist")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "text", tokenizer, FileNotFoundError, "no file ending in .txt")
    (tmp_path / "empty.txt").touch()
    refused(tmp_path / "empty.txt", "text", tokenizer, ValueError, "empty.txt is empty")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text" * 99)[:30])
    refused(tmp_path / "cut.txt.gz", "text", tokenizer, ValueError, "not a complete gzip file")


def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "alpha"}\n\n{"text": \n')
    refused(file, "jsonl", tokenizer, ValueError, r"bad.jsonl line 3 is not JSON")
    file.write_text('{"text": "alpha"}\n{"body": "alpha"}\n')
    refused(file, "jsonl", tokenizer, ValueError, r"line 2 has no text under 'text'; found: body")
    file.write_text("[1, 2]\n")
    refused(file, "jsonl", tokenizer, ValueError, r"line 1: list is not a JSON object")


def test_missing_paths_are_refused(text: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"data\.paths"):
        DataConfig(source="text")
    only_train = DataConfig(source="text", paths=(str(text),))
    with pytest.raises(ValueError, match=r"data\.eval_paths"):
        pipeline.eval_batches(only_train, tokenizer)

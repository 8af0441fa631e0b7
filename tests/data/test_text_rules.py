"""Rules about text and labels that hold wherever they are read."""

import dataclasses
import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.config.data import DataConfig
from elastic_lm.config.task import TaskConfig
from elastic_lm.data import labelled, pipeline, sources
from elastic_lm.data.records import Records, class_names, class_number, label_of, text_of
from elastic_lm.data.sources import JsonLines, TextFiles
from elastic_lm.data.splitting import read_pieces
from elastic_lm.data.tokenizer import Tokenizer, train_bpe

LATIN = "café déjà vu\n".encode("latin-1") * 40
SMALL = settings(deadline=None, derandomize=True, max_examples=40)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["alpha beta gamma"], 270)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
def test_every_reader_refuses_what_is_no_text(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(LATIN) if name.endswith(".gz") else LATIN)
    readers = [lambda: TextFiles([file], 8), lambda: JsonLines([file], "text"), lambda: Records([file])]
    for read in [*readers, lambda: read_pieces([str(file)])]:
        with pytest.raises(ValueError, match=r"a\..*: is not UTF-8 text \(line 1 holds the byte 0xe9\)"):
            read()


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    texts = {"a.txt": "alpha\n", "a.jsonl": '{"text": "alpha"}\n', "a.csv": "text,b\nalpha,1\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    document = TextFiles([tmp_path / "a.txt"], 100)[0]
    assert (document.text, document.starts, document.ends) == ("alpha\n", True, True)
    assert JsonLines([tmp_path / "a.jsonl"], "text")[0].text == "alpha"
    assert Records([tmp_path / "a.csv"])[0][1] == {"text": "alpha", "b": "1"}
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match=r"b\.txt is empty"):
        TextFiles([tmp_path / "b.txt"], 100)


def test_lines_of_json_and_tables_end_at_newlines_alone(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c\u2029d"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": odd}, ensure_ascii=False) * 1 + "\n", "utf-8")
    (tmp_path / "a.tsv").write_text(f"text\tn\n{odd}\x0c\t1\n", "utf-8")
    assert JsonLines([tmp_path / "a.jsonl"], "text")[0].text == odd
    assert Records([tmp_path / "a.tsv"])[0][1] == {"text": odd + "\x0c", "n": "1"}


def test_half_a_character_is_named_by_file_and_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine", "label": "x"}\n{"text": "cut \\ud83d", "label": "y"}\n')
    message = r"a\.jsonl line 2: text holds half of a character"
    with pytest.raises(ValueError, match=message):
        JsonLines([file], "text")[1]
    with pytest.raises(ValueError, match=message):
        text_of(*Records([file])[1], "text")
    for encode in (tokenizer.encode, tokenizer.encode_pair):
        with pytest.raises(ValueError, match="text holds half of a character"):
            encode("cut \ud83d")


@SMALL
@given(st.lists(st.text(st.sampled_from("ab\n\r\u2028\x0c é🙂"), min_size=1, max_size=12), max_size=4))
def test_pieces_of_text_join_to_the_text(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    text = "".join(parts) + "end"
    file = tmp_path_factory.mktemp("pieces") / "a.txt"
    file.write_bytes(text.encode())
    pieces = [TextFiles([file], 4)[i] for i in range(len(TextFiles([file], 4)))]
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])
    assert [piece.starts for piece in pieces] == [True, *[False] * (len(pieces) - 1)]


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.lists(st.text(st.sampled_from("abc "), max_size=9), min_size=1, max_size=6), st.booleans())
def test_packing_keeps_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, texts: list[str], whole: bool
) -> None:
    """Documents of one token and of none are among them."""
    file = tmp_path_factory.mktemp("packed") / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(
        source="jsonl",
        paths=(str(file),),
        eval_paths=(str(file),),
        seq_len=12,
        batch_size=2,
        packing="first_fit" if whole else "concat",
    )
    ends = list(tokenizer.eos_ids)
    wanted = [
        pair for text in texts for ids in [tokenizer.encode(text) + ends] for pair in itertools.pairwise(ids)
    ]
    found = []
    for batch in pipeline.eval_batches(config, tokenizer):
        counted = batch["weights"] > 0
        assert not np.any(counted & (batch["segments"] == 0))
        found += zip(batch["tokens"][counted].tolist(), batch["targets"][counted].tolist(), strict=True)
    assert sorted(found) == sorted(wanted)


def classes(tmp_path: Path, values: list[object], **fields: object) -> tuple[str, ...]:
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"sentence": "x", "label": value}) + "\n" for value in values))
    return labelled.classes(TaskConfig(paths=(str(file),), **fields))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (float("nan"), "line 3 has nan under 'label', which stands for a missing value"),
        (-float("inf"), "line 3 has -inf under 'label'"),
        (None, "line 3 has no text under 'label'"),
        ("", "line 3 has an empty 'label'"),
        (" \t", "line 3 has an empty 'label'"),
        ("NaN", "line 3: the label 'NaN' stands for a missing value"),
        ("-Infinity", "line 3: the label '-Infinity' stands for a missing value"),
        ("None", "line 3: the label 'None' stands for a missing value"),
        ("null", "line 3: the label 'null'"),
        ("<NA>", "line 3: the label '<NA>'"),
        ("N/A", "line 3: the label 'N/A'"),
        ("1.0", "the label '1.0' and the label '1' of .*line 2 are one number|label '1' and the label '1.0'"),
    ],
)
def test_missing_labels_and_two_spellings_are_refused(tmp_path: Path, odd: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classes(tmp_path, [0, 1, odd])


def test_numbers_with_further_zeros_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'1\.5' and the label|'1\.50' and the label"):
        classes(tmp_path, [1.5, "1.50"])


def test_a_table_with_other_line_ends_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\ra,b\r")
    with pytest.raises(ValueError, match=r"a\.csv line 1 is not CSV: .*; its lines must end at newlines"):
        Records([tmp_path / "a.csv"])


def test_one_rule_for_labels(tmp_path: Path) -> None:
    assert classes(tmp_path, [10, 9, "b", "a", True, 1.5, "9 ", 9.0, -0.0, 0]) == (
        *("0", "1.5", "9", "10"),
        *("a", "b", "true"),
    )
    assert classes(tmp_path, ["nan", "eng"], labels=("nan", "eng")) == ("nan", "eng")  # languages, by name
    with pytest.raises(ValueError, match=r"task\.labels=.*every class needs a name"):
        classes(tmp_path, ["a", "b"], labels=("a", " "))


def test_classes_are_found_by_numbers_in_either_spelling(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert [class_number(name, ("0", "1.0", "1.10", "x")) for name in ("1", "0.0", "1.1", "x", "y")] == [
        *(1, 0, None),
        *(3, None),
    ]
    config = TaskConfig(paths=("d",), labels=("0", "1"))
    target = [
        labelled.example(config, tokenizer, config.labels, None, ("d", {"sentence": "a", "label": label}))[
            "target"
        ]
        for label in (1, 1.0, "1", "1.0", " 1", 0)
    ]
    assert target == [1, 1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="d: label='2': is no class of the task; choose from 0, 1"):
        labelled.example(config, tokenizer, config.labels, None, ("d", {"sentence": "a", "label": 2.0}))


LABELS = st.one_of(
    st.integers(-5, 20),
    st.floats(-3, 3, width=16),
    st.booleans(),
    st.text(st.sampled_from("ab1. -"), max_size=4),
)


@SMALL
@given(st.lists(LABELS, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_classes_depends_on_their_names_alone(values: list[object], random) -> None:
    def names(values: list[object]) -> tuple[str, ...] | str:
        try:
            return class_names({label_of("f", {"label": value}, "label"): "f" for value in values})
        except ValueError:
            return "refused"

    found = names(values)
    shuffled = values[:]
    random.shuffle(shuffled)
    assert names(shuffled) == found
    if found == "refused":
        return
    assert all(name == name.strip() != "" for name in found)
    for value in values:
        assert class_number(label_of("f", {"label": value}, "label"), found) is not None
    numbers = [float(name) for name in found if name.lstrip("-").replace(".", "", 1).isdigit()]
    assert numbers == sorted(numbers)


def test_missing_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="f line 1 has nan under 'text', which stands for a missing value"):
        text_of("f line 1", {"text": float("nan")}, "text")


def test_names_in_capitals_and_packed_ones_are_read_alike(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = '{"text": "alpha beta gamma"}\n'
    (tmp_path / "A.JSONL").write_text(line)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(line.encode()))
    config = DataConfig(source="jsonl", paths=(str(tmp_path),), seq_len=4)
    assert len(pipeline.documents(config, "train")) == 2
    assert len(read_pieces([str(tmp_path)])) == 2
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"alpha\n"))
    text = dataclasses.replace(config, source="text")
    assert pipeline.file_texts(text) == ["alpha\n"]


def test_many_files_are_checked_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    real = sources.text_start
    monkeypatch.setattr(sources, "text_start", lambda path, data: checked.append(path) or real(path, data))
    for i in range(260):
        (tmp_path / f"{i}.txt").write_text("alpha\n")
    files = TextFiles(sorted(tmp_path.glob("*.txt")), 100)
    for _ in range(2):
        assert all(files[i].text == "alpha\n" for i in range(len(files)))
    assert len(checked) == 260

"""Three parts of a text, however it is cut into files and lines."""

import json
import pathlib

import numpy as np
import pytest

from elastic_lm.data.text_parts import ROWS, batches, text_parts

SIZES = {"seq_len": 64, "fit_tokens": 4096, "test_tokens": 2048, "prompts": 3, "prompt_tokens": 20}


class Characters:
    """One token per character; 0 begins a text."""

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [0] * bos + [ord(letter) for letter in text]


def written(count: int) -> str:
    """Numbers, each of which is another one."""
    return " ".join(f"{i:05d}" for i in range(count))


def numbers(rows: np.ndarray) -> set[str]:
    """The whole numbers in some rows."""
    words = " ".join("".join(map(chr, row)) for row in rows).split()
    return {word for word in words if len(word) == 5}


@pytest.mark.parametrize("between", [" ", "\n"])
def test_parts_share_nothing(tmp_path: pathlib.Path, between: str) -> None:
    (tmp_path / "text.txt").write_text(written(4000).replace(" ", between))
    parts = text_parts([str(tmp_path)], Characters(), **SIZES)
    assert parts.fitting.shape == (63, 65)
    assert parts.testing.shape == (31, 65)
    assert [len(prompt) for prompt in parts.prompts] == [20] * 3
    assert parts.prompts[0][0] == 0

    prompts = np.asarray([prompt[1:] for prompt in parts.prompts])
    fitted, tested, begun = numbers(parts.fitting), numbers(parts.testing), numbers(prompts)
    assert min(len(fitted), len(tested), len(begun)) > 0
    assert not fitted & tested
    assert not begun & (fitted | tested)


@pytest.mark.parametrize(("words", "lines"), [(40, 60), (2, 1000)])
def test_json_lines(tmp_path: pathlib.Path, words: int, lines: int) -> None:
    records = [json.dumps({"text": f"{i:05d} " * words}) for i in range(lines)]
    (tmp_path / "text.jsonl").write_text("\n".join(records))
    parts = text_parts([str(tmp_path / "text.jsonl")], Characters(), **SIZES)
    assert not numbers(parts.fitting) & numbers(parts.testing)
    assert [len(prompt) for prompt in parts.prompts] == [20] * 3


def test_short_rows_where_the_text_is_short(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(written(700))
    parts = text_parts([str(file)], Characters(), **{**SIZES, "seq_len": 256})
    assert 64 < parts.fitting.shape[1] - 1 < 256
    assert len(list(batches(parts.fitting))) >= 8

    file.write_text(written(50))
    with pytest.raises(
        ValueError, match=r"--data .*text.txt: 299 tokens of text are too few, 4096 are needed"
    ):
        text_parts([str(file)], Characters(), **SIZES)


def test_batches_are_whole_rows() -> None:
    rows = np.arange(11 * 5, dtype=np.int32).reshape(11, 5)
    first, second = batches(rows)
    assert first.tokens.shape == (ROWS, 4)
    np.testing.assert_array_equal(second.tokens, rows[4:8, :-1])
    np.testing.assert_array_equal(second.targets, rows[4:8, 1:])
    assert second.weights.all()
    np.testing.assert_array_equal(second.positions[0], range(4))

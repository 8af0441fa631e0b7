"""Which answers are right: names, choices, numbers, texts, and labels that no answer can match."""

import pytest

from elastic_lm.cascade.function import Function
from elastic_lm.cli.cascade.quality import (
    choice_of,
    class_names,
    named,
    quality,
    right_answers,
    written_names,
)

STARS = {"swift": ("1", "2", "3"), "super": ("3", "1", "2")}


class Model(Function):
    """A model with a task head, as far as names go."""

    def __init__(self, names: tuple[str, ...] = (), classes: int = 0) -> None:
        super().__init__(lambda record: 0)
        self.names, self.classes = names, classes or len(names)


def right(label, names=None, tolerance=None, **record):
    how = {"label_field": "label", "choices_field": "choices", "tolerance": tolerance}
    return right_answers([{"label": label, **record}], names or {}, data="d.jsonl", **how)[0]


@pytest.mark.parametrize(
    ("output", "model", "label", "expected"),
    [
        (0, "swift", 1, 1.0),  # the class "1", not the class of index 1
        (1, "swift", 1, 0.0),
        (1, "super", 1, 1.0),
        (0, "super", "3", 1.0),
        (2, "swift", ["1", 3], 1.0),
    ],
)
def test_classes_are_compared_by_name(output: int, model: str, label: object, expected: float) -> None:
    assert quality(named(output, model, STARS), right(label, STARS)) == expected


@pytest.mark.parametrize(
    ("output", "label", "expected"),
    [
        (1, 1, 1.0),
        (True, 1, 1.0),
        (" Yes", "Yes", 1.0),
        ("a", ["b", "a"], 1.0),
        ("7", 7, 1.0),
        (1.0, "1", 1.0),
        ("no", "yes", 0.0),
        ("no", 1, 0.0),
    ],
)
def test_other_answers(output: object, label: object, expected: float) -> None:
    assert quality(output, right(label)) == expected


def test_numbers_within_a_tolerance() -> None:
    assert quality(2.3, right(2.5, tolerance=0.25), 0.25) == 1.0
    assert quality(2.3, right("2.6", tolerance=0.25), 0.25) == 0.0
    assert quality("a text", right(2.5, tolerance=0.25), 0.25) == 0.0
    with pytest.raises(ValueError, match="--tolerance"):
        quality(2.5, [2.5])
    with pytest.raises(ValueError, match=r"d.jsonl record 1: label='yes': --tolerance 0.1 compares numbers"):
        right("yes", tolerance=0.1)


@pytest.mark.parametrize("label", [1, "1", "B", " blue", ["x", "blue"][1]])
def test_choices_by_index_letter_and_text(label: object) -> None:
    record = {"choices": ["red", "blue"]}
    assert right(label, **record) == ["blue"]
    assert choice_of(1, record["choices"]) == ("number", "blue")


@pytest.mark.parametrize(
    ("label", "names", "record", "message"),
    [
        ("yes", STARS, {}, "label='yes': is no class of the models, which know 1, 2, 3"),
        (0, STARS, {}, "record 1: label=0: is no class"),
        (None, STARS, {}, "label=None: must be a text or a number"),
        (None, {}, {}, "label=None: must be a text or a number"),
        ("C", {}, {"choices": ["a b", "c"]}, "label='C': is none of the record's 2 choices"),
        (2, {}, {"choices": ["a b", "c"]}, "label=2: is none of the record's 2 choices"),
        (0, {}, {"choices": {"text": ["a"]}}, "choices=.*: must be a list of at least one text"),
    ],
)
def test_labels_that_no_answer_matches(label: object, names: dict, record: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        right(label, names, **record)


def test_choices_may_be_numbers() -> None:
    assert right("12", choices=[3, 12]) == right(1, choices=[3, 12]) == ["12"]


def test_huge_numbers_are_no_choice() -> None:
    assert choice_of(10**400, ["a", "b"]) is None


def test_letters_and_numbers_are_not_mixed() -> None:
    records = [{"label": label, "choices": ["a b", "c d"]} for label in ("B", "1")]
    with pytest.raises(ValueError, match=r"record 2: label='1': the file names choices by letters and by n"):
        right_answers(records, {}, data="d", label_field="label", choices_field="choices", tolerance=None)


def test_names_of_a_pair() -> None:
    named_, other = Model(("no", "yes")), Model(("yes", "no"))
    names = written_names(named_, other)
    assert [named(1, model, names) for model in ("swift", "super")] == ["yes", "no"]
    assert written_names(Model(classes=2), Model(classes=2)) == {}
    assert class_names(Model(classes=2), Model(classes=2))["super"] == ("0", "1")
    service = class_names(named_, Function(lambda record: 0))
    assert [named(output, "super", service) for output in (1, "yes", "what", 7)] == ["yes", "yes", "what", 7]
    for wrong in (Model(("no", "maybe")), Model(classes=2)):
        with pytest.raises(ValueError, match=r"--swift: its classes are no, yes, and those of --super are"):
            class_names(named_, wrong)

"""Which answers of a Swift and a Super are right: classes by their names, choices, numbers and texts.

Models may number the same classes differently, so that answers are compared, and written, by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_lm.cascade.answerer import Answerer, Record
from elastic_lm.config.checks import require
from elastic_lm.data.records import text_of

Names = Mapping[str, Sequence[str]]  # "swift", "super" -> names of the classes, in the order of the indices
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def class_names(swift: Answerer, super_: Answerer) -> dict[str, tuple[str, ...]]:
    """Names of both models' classes; an unnamed head's are its indices; () = no classes.

    Raises:
      ValueError: they name different ones.
    """
    names = {"swift": _names(swift), "super": _names(super_)}
    own, other = names.values()
    if own and other and set(own) != set(other):
        raise ValueError(
            f"--swift: its classes are {', '.join(own)}, and those of --super are {', '.join(other)}; both "
            "have to know the same ones, by the same names (labels of their configurations)"
        )
    return names


def written_names(swift: Answerer, super_: Answerer) -> Names:
    """`class_names` where at least one model was given some; {} = indices are written as they are."""
    given = any(getattr(model, "names", ()) for model in (swift, super_))
    return class_names(swift, super_) if given else {}


def _names(model: Answerer) -> tuple[str, ...]:
    return tuple(getattr(model, "names", ())) or tuple(map(str, range(getattr(model, "classes", 0))))


def named(output: Any, model: str, names: Names) -> Any:
    """An output as it is compared and written: the name of a class where it has one.

    Args:
      output: index, name, number or text.
      model: "swift" or "super".
      names: of classes. Where this model has none, a service for example, its indices are the other's.
    """
    own = names.get(model) or ()
    known = own or next(filter(None, names.values()), ())
    is_index = isinstance(output, int) and not isinstance(output, bool) and 0 <= output < len(known)
    return known[output] if is_index and (own or str(output) not in known) else output


def right_answers(
    rows: Sequence[Record],
    names: Names,
    *,
    data: str,
    label_field: str,
    choices_field: str,
    tolerance: float | None,
) -> list[list[Any]]:
    """What is right of every row: names of classes, texts of choices, numbers or texts.

    Args:
      rows: with labels; a list of labels means that any is right.
      names: from `class_names`.
      data: where the rows are, for messages.
      label_field: of the label.
      choices_field: of the choices of a row, where it has some and the models no classes.
      tolerance: labels are numbers; None = they need not be.

    Returns:
      One list per row.

    Raises:
      ValueError: a label is missing, or one that no answer can match; names the row.
    """
    known = next(filter(None, names.values()), ())
    found, ways = [], set()
    for number, row in enumerate(rows, 1):
        where = f"{data} row {number}"
        fix = f"--label-field names the right answer; the row has {', '.join(row)}"
        if label_field not in row:
            raise ValueError(f"{where}: no {label_field!r}: {fix}")
        label, choices = row[label_field], row.get(choices_field)
        labels = label if isinstance(label, list) else [label]
        if choices is not None and not known and tolerance is None:
            pairs = [_choice(f"{where}: {label_field}", one, choices) for one in labels]
            ways |= {way for way, _ in pairs}
            fix = "the file names choices by letters and by numbers; name them all by one"
            require(not {"letter", "number"} <= ways, f"{where}: {label_field}", label, fix)
            found.append([text for _, text in pairs])
        else:
            found.append([_label(f"{where}: {label_field}", one, known, tolerance) for one in labels])
    return found


def _label(where: str, label: Any, known: Sequence[str], tolerance: float | None) -> Any:
    """A label that answers can be compared with."""
    if tolerance is not None:
        fix = f"--tolerance {tolerance:g} compares numbers; leave it out, or name a field of numbers"
        require(not math.isnan(number_of(label)), where, label, fix)
        return label
    right = isinstance(label, str | int | float) and label == label
    require(right, where, label, "must be a text or a number")
    if known:
        text = text_of(where, {"label": label}, "label")
        require(text in known, where, label, f"is no class of the models, which know {', '.join(known)}")
        return text
    return label


def _choice(where: str, label: Any, choices: Any) -> tuple[str, str]:
    """(how a label names a choice, the choice's text)."""
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    require(texts, where.rsplit(":", 1)[0] + ": choices", choices, "must be a list of texts")
    if (found := choice_of(label, choices)) is None:
        fix = f"is none of the row's {len(choices)} choices; give its index (from 0), its letter or its text"
        require(False, where, label, fix)
    assert found is not None
    return found


def choice_of(value: Any, choices: Sequence[str]) -> tuple[str, str] | None:
    """(how a value names a choice, the choice's text); None = it names none.

    Args:
      value: its text, its index from 0 (also as text), or its letter from A.
      choices: of the row.
    """
    if isinstance(value, str) and value.strip() in (texts := [choice.strip() for choice in choices]):
        return "text", choices[texts.index(value.strip())]
    if isinstance(value, str) and len(value) == 1 and value in LETTERS[: len(choices)]:
        return "letter", choices[LETTERS.index(value)]
    index = number_of(value)
    if index in range(len(choices)) and not isinstance(value, bool):
        return "number", choices[int(index)]
    return None


def quality(output: Any, right: Sequence[Any], tolerance: float | None = None) -> float:
    """1 where an answer is right, else 0.

    Args:
      output: name, number or text (`named`, and a choice by its text).
      right: from `right_answers`.
      tolerance: numbers this far from the label are right; None = they have to be whole and equal.

    Raises:
      ValueError: a number that is not whole is compared without a tolerance.
    """
    if tolerance is not None:
        return float(any(abs(number_of(output) - number_of(one)) <= tolerance for one in right))
    fix = "is no class; say with --tolerance how close to the label is right"
    require(not isinstance(output, float) or output.is_integer(), "answer", output, fix)
    return float(any(_same(output, one) for one in right))


def _same(output: Any, one: Any) -> bool:
    if isinstance(output, str) and isinstance(one, str):
        return output.strip() == one.strip()
    return output == one or number_of(output) == number_of(one)


def number_of(value: Any) -> float:
    """A number, also one written as text; NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan

"""Which answers of a cascade's models are right: classes by their names, choices, numbers and texts.

Models may number the same classes differently, so answers are compared and written by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_lm.cascade.answerer import Answerer, Record, choice_texts
from elastic_lm.config.cascade import member_names
from elastic_lm.config.checks import require
from elastic_lm.data.records import class_number, label_of

Names = Mapping[str, Sequence[str]]  # name of a member -> names of its classes, in the order of the indices
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def class_names(*members: Answerer) -> dict[str, tuple[str, ...]]:
    """Names of all models' classes; those of a head without names are its indices; () = no classes.

    Args:
      *members: of the cascade, in their order.

    Raises:
      ValueError: the models name different classes.
    """
    names = dict(zip(member_names(len(members)), map(_names, members), strict=True))
    known = {name: own for name, own in names.items() if own}
    (first, of_first), *others = known.items() or [("", ())]
    for other, of_other in others:
        if set(of_first) != set(of_other):
            raise ValueError(
                f"--{first}: its classes are {', '.join(of_first)}, and those of --{other} are "
                f"{', '.join(of_other)}; both have to know the same ones, by the same names (labels of their "
                "configurations)"
            )
    return names


def written_names(*members: Answerer) -> Names:
    """`class_names` if at least one of the models names its classes; {} = indices are written as they are."""
    return class_names(*members) if any(getattr(model, "names", ()) for model in members) else {}


def _names(model: Answerer) -> tuple[str, ...]:
    return tuple(getattr(model, "names", ())) or tuple(map(str, range(getattr(model, "classes", 0))))


def named(output: Any, model: str, names: Names) -> Any:
    """An output as it is compared and written: the name of a class where it has one.

    Args:
      output: index, name, number or text.
      model: "swift", "super" or another member's name.
      names: of classes. A model without names, such as a service, counts as the other one does.
    """
    own = names.get(model) or ()
    known = own or next(filter(None, names.values()), ())
    is_index = isinstance(output, int) and not isinstance(output, bool) and 0 <= output < len(known)

    # A service may answer with a number that is the name of a class.
    return known[output] if is_index and (own or str(output) not in known) else output


def right_answers(
    records: Sequence[Record],
    names: Names,
    *,
    data: str,
    label_field: str,
    choices_field: str,
    tolerance: float | None,
) -> list[list[Any]]:
    """What is right for every record: names of classes, texts of choices, numbers or texts.

    Args:
      records: with labels; a list of labels means that any of them is right.
      names: from `class_names`.
      data: where the records are, for messages.
      label_field: key of the label.
      choices_field: key of the choices, where records have some and the models have no classes.
      tolerance: labels are numbers; None = they need not be.

    Returns:
      One list per record.

    Raises:
      ValueError: a label is missing, or no answer can match it; names the record.
    """
    known = next(filter(None, names.values()), ())
    found, ways = [], set()
    for number, record in enumerate(records, 1):
        where = f"{data} record {number}"
        if label_field not in record:
            raise ValueError(
                f"{where}: no {label_field!r}: --label-field names the right answer; the record has "
                f"{', '.join(record)}"
            )
        label, choices = record[label_field], record.get(choices_field)
        labels = label if isinstance(label, list) else [label]
        if choices is None or known or tolerance is not None:
            found.append([_label(f"{where}: {label_field}", one, known, tolerance) for one in labels])
            continue

        pairs = [_choice(f"{where}: {label_field}", one, choices) for one in labels]
        ways |= {way for way, _ in pairs}
        require(
            not {"letter", "number"} <= ways,
            f"{where}: {label_field}",
            label,
            "the file names choices by letters and by numbers; name them all by one",
        )
        found.append([text for _, text in pairs])
    return found


def _label(where: str, label: Any, known: Sequence[str], tolerance: float | None) -> Any:
    """A label that answers can be compared with."""
    if tolerance is not None:
        require(
            not math.isnan(number_of(label)),
            where,
            label,
            f"--tolerance {tolerance:g} compares numbers; leave it out, or name a field of numbers",
        )
        return label
    # NaN and infinity, which JSON lines may hold, stand for missing values.
    comparable = isinstance(label, str | int) or (isinstance(label, float) and math.isfinite(label))
    require(comparable, where, label, "must be a text or a number")
    if known:
        number = class_number(label_of(where, {"label": label}, "label"), known)
        if number is None:
            raise ValueError(f"{where}={label!r}: is no class of the models, which know {', '.join(known)}")
        return known[number]
    return label


def _choice(where: str, label: Any, choices: Any) -> tuple[str, str]:
    """(how a label names a choice, the choice's text)."""
    texts = choice_texts(where.rsplit(":", 1)[0] + ": choices", choices)
    found = choice_of(label, texts)
    if found is None:
        raise ValueError(
            f"{where}={label!r}: is none of the record's {len(choices)} choices; give its index (from 0), "
            "its letter or its text"
        )
    return found


def choice_of(value: Any, choices: Sequence[str]) -> tuple[str, str] | None:
    """(how a value names a choice, the choice's text); None = it names none.

    Args:
      value: the text of a choice, its index from 0 (also as text), or its letter from A.
      choices: of the record.
    """
    if isinstance(value, str):
        texts = [choice.strip() for choice in choices]
        if value.strip() in texts:
            return "text", choices[texts.index(value.strip())]
        if len(value) == 1 and value in LETTERS[: len(choices)]:
            return "letter", choices[LETTERS.index(value)]
    index = number_of(value)
    if index in range(len(choices)) and not isinstance(value, bool):
        return "number", choices[int(index)]
    return None


def quality(output: Any, right: Sequence[Any], tolerance: float | None = None) -> float:
    """1 where an answer is right, else 0.

    Args:
      output: name, number or text (from `named`); a choice is given by its text.
      right: from `right_answers`.
      tolerance: numbers at most this far from the label are right; None = numbers are whole and equal it.

    Raises:
      ValueError: a number that is not whole is compared without a tolerance.
    """
    if tolerance is not None:
        return float(any(abs(number_of(output) - number_of(one)) <= tolerance for one in right))
    require(
        not isinstance(output, float) or output.is_integer(),
        "answer",
        output,
        "is no class; say with --tolerance how close to the label is right",
    )
    return float(any(_same(output, one) for one in right))


def _same(output: Any, one: Any) -> bool:
    if isinstance(output, str) and isinstance(one, str):
        return output.strip() == one.strip()
    return output == one or number_of(output) == number_of(one)


def number_of(value: Any) -> float:
    """A number, also one written as text; NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan

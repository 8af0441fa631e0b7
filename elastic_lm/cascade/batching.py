"""Rows into batches of one shape, and their answers back in order."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import jax

from elastic_lm.cascade.answerer import Answer, failed
from elastic_lm.data.padding import Given

Encoded = TypeVar("Encoded")
Shape = TypeVar("Shape", bound=Hashable)

ROW_ERRORS = (ValueError, TypeError, LookupError, AttributeError)  # what a row that cannot be read raises


def answer_alike(
    rows: Iterable[Given],
    encode: Callable[[Given], tuple[Shape, Encoded]],
    run: Callable[[Shape, list[Encoded]], Sequence[Answer]],
    batch_size: int,
) -> list[Answer]:
    """Answers rows in batches whose rows have one shape.

    Args:
      rows: of any shapes.
      encode: from a row to (its shape, what is batched); what it raises is the error of this row alone.
      run: from a shape and at most `batch_size` encoded rows to their answers; where a program fails, as for
        want of memory, that is the error of these rows alone.
      batch_size: rows per batch.

    Returns:
      One answer per row, in order.
    """
    answers: dict[int, Answer] = {}
    alike: dict[Shape, list[tuple[int, Encoded]]] = {}
    count = 0
    for i, row in enumerate(rows):
        count += 1
        try:
            shape, encoded = encode(row)
        except ROW_ERRORS as error:
            answers[i] = failed(error)
        else:
            alike.setdefault(shape, []).append((i, encoded))
    for shape, group in alike.items():
        for first in range(0, len(group), batch_size):
            batch = group[first : first + batch_size]
            found = _run(run, shape, [encoded for _, encoded in batch])
            answers.update(zip([i for i, _ in batch], found, strict=True))
    return [answers[i] for i in range(count)]


def _run(
    run: Callable[[Shape, list[Encoded]], Sequence[Answer]], shape: Shape, batch: list[Encoded]
) -> Sequence[Answer]:
    try:
        return run(shape, batch)
    except jax.errors.JaxRuntimeError as error:
        return [failed(error)] * len(batch)


def shape_or_none(row: Given, encode: Callable[[Given], tuple[Shape, Encoded]]) -> Shape | None:
    """The shape of a row; None where it cannot be read."""
    try:
        return encode(row)[0]
    except ROW_ERRORS:
        return None

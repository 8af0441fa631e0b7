"""Answers inputs in batches of one shape: one compiled program per shape, answers in the inputs' order."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import jax

from elastic_lm.cascade.answerer import Answer, failed
from elastic_lm.models.finite import NotFiniteError

Input = TypeVar("Input")
Encoded = TypeVar("Encoded")
Shape = TypeVar("Shape", bound=Hashable)

RECORD_ERRORS = (ValueError, TypeError, LookupError, AttributeError)  # what an unreadable record raises


class ProgramShape(NamedTuple):
    """What decides which compiled program reads a sequence."""

    width: int  # columns of the token array
    layers_done: int = 0  # layers that an earlier model has run


def answer_by_shape(
    inputs: Iterable[Input],
    encode: Callable[[Input], tuple[Shape, Encoded]],
    run: Callable[[Shape, list[Encoded]], Sequence[Answer]],
    batch_size: int,
) -> list[Answer]:
    """Groups inputs by shape and answers each group in batches.

    Args:
      inputs: of any shapes.
      encode: from an input to its shape and to what is batched. What it raises is the error of this input
        alone.
      run: from a shape and at most `batch_size` encoded inputs to their answers. Where its program fails,
        for lack of memory for example, that is the error of this batch alone; results that are not finite
        are errors of single records.
      batch_size: inputs per batch.

    Returns:
      One answer per input, in order.
    """
    answers: dict[int, Answer] = {}
    by_shape: dict[Shape, list[tuple[int, Encoded]]] = {}
    count = 0
    for i, one in enumerate(inputs):
        count += 1
        try:
            shape, encoded = encode(one)
        except RECORD_ERRORS as error:
            answers[i] = failed(error)
        else:
            by_shape.setdefault(shape, []).append((i, encoded))

    for shape, group in by_shape.items():
        for first in range(0, len(group), batch_size):
            batch = group[first : first + batch_size]
            batch_answers = _run_or_fail(run, shape, [encoded for _, encoded in batch])
            answers.update(zip([i for i, _ in batch], batch_answers, strict=True))

    return [answers[i] for i in range(count)]


def _run_or_fail(
    run: Callable[[Shape, list[Encoded]], Sequence[Answer]], shape: Shape, batch: list[Encoded]
) -> Sequence[Answer]:
    try:
        return run(shape, batch)
    except jax.errors.JaxRuntimeError as error:
        return [failed(error)] * len(batch)
    except NotFiniteError as error:
        if len(batch) == 1:
            return [failed(error)]
        # The message is about one record; alone, the others are answered.
        return [answer for one in batch for answer in _run_or_fail(run, shape, [one])]


def shape_or_none(one: Input, encode: Callable[[Input], tuple[Shape, Encoded]]) -> Shape | None:
    """The shape of an input; None where it cannot be read."""
    try:
        return encode(one)[0]
    except RECORD_ERRORS:
        return None

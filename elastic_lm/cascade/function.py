"""A Python function as a model of a cascade."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from elastic_lm.cascade.answerer import Answer, Record, failed
from elastic_lm.config.checks import require, require_not_negative
from elastic_lm.files.python_files import run_file


class Function:
    """A Python function as a model.

    Example:
      ```python
      from elastic_lm.cascade import Function

      one_by_one = Function(lambda record: record["n"] + 1, cost=3.0)
      at_once = Function(lambda records: [record["n"] + 1 for record in records], batches=True)
      records = [{"n": 1}, {"n": 2}]
      assert [answer.output for answer in one_by_one.answer(records)] == [2, 3]
      assert [answer.output for answer in at_once.answer(records)] == [2, 3]
      assert Function(lambda record: record["m"]).answer(records)[0].error == "KeyError: 'm'"
      ```
    """

    reads: ClassVar[tuple[str, ...]] = ()  # options of the command line; a function reads none

    def __init__(self, function: Callable[..., Any], *, cost: float = 0.0, batches: bool = False) -> None:
        """Wraps a function.

        Args:
          function: from a record to its output, or to an `Answer` with scores and cost. What it raises is
            the error of that record.
          cost: FLOPs of a record, where the function does not return an `Answer`.
          batches: the function takes a list of records and returns a list; what it raises is the error of
            every record in it.

        Raises:
          ValueError: there is no function, or the cost is negative or not finite.
        """
        require(callable(function), "function", function, "must be a function of a record")
        require_not_negative("cost", cost)
        self._function, self._cost, self._batches = function, cost, batches

    @classmethod
    def from_place(cls, place: str) -> "Function":
        """The function `answer` of a Python file, which the command line calls `Function:FILE`.

        Args:
          place: a Python file whose function `answer` takes a record and returns an output or an `Answer`.

        Raises:
          OSError: there is no such file.
          ValueError: it cannot be run, or defines no such function.
        """
        function = run_file("answerer", Path(place)).get("answer")
        if not callable(function):
            raise ValueError(f"{place} has no function answer: define answer(record)")
        return cls(function)

    def answer(self, records: Sequence[Record]) -> list[Answer]:
        """Answers records, as in `Answerer.answer`."""
        if self._batches:
            return self._answer_batch(records)
        return [self._answer_one(record) for record in records]

    def _answer_one(self, record: Record) -> Answer:
        began = time.perf_counter()
        try:
            output = self._function(record)
        except Exception as error:
            return failed(error, time.perf_counter() - began)
        return self._as_answer(output, time.perf_counter() - began)

    def _answer_batch(self, records: Sequence[Record]) -> list[Answer]:
        began, n = time.perf_counter(), len(records)
        try:
            outputs = list(self._function(list(records)))
            require(len(outputs) == n, "outputs", len(outputs), f"give one per record ({n})")
        except Exception as error:
            return [failed(error, (time.perf_counter() - began) / n) for _ in records]
        each = (time.perf_counter() - began) / max(n, 1)
        return [self._as_answer(output, each) for output in outputs]

    def _as_answer(self, output: Any, seconds: float) -> Answer:
        return output if isinstance(output, Answer) else Answer(output, cost=self._cost, seconds=seconds)

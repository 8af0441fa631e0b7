"""A text read in order by a model of limited context: windows, as published perplexities are computed.

With a context of L tokens and a stride of S, window k holds tokens kS .. kS + L - 1. Each token counts once,
in the first window that predicts it, so that all but the first window give it at least L - S tokens to look
back on. Where S = L the windows lie side by side, and the first token of each is read but not predicted.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from elastic_lm.config.checks import require, require_at_least_1


def windows(
    ids: Sequence[int], context: int, stride: int | None = None, *, batch_size: int = 1
) -> Iterator[dict[str, Any]]:
    """Cuts the ids of one text into batches of windows.

    Args:
      ids: the whole text in order, with the id that begins a text where the tokenizer has one.
      context: L, tokens that the model sees at once; at least 2.
      stride: S, tokens from the beginning of one window to that of the next, from 1 to L; None = L.
      batch_size: windows per batch.

    Returns:
      Dicts of the fields of `Batch`, [batch_size, L - 1] each; tokens that only give context, and padding,
      have weight 0.

    Raises:
      ValueError: a number is out of its range, or there are fewer than two ids.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      ids = el.testing.random_tokens(config, batch=1, length=50)[0].tolist()
      params = el.testing.random_params(config)

      batches = el.data.windows(ids, context=16, stride=8, batch_size=2)
      exit_, full = el.evaluate.evaluate(config, params, batches)
      print(full.perplexity)  # of 49 tokens
      ```
    """
    require(context >= 2, "context", context, "must be at least 2: a token and the one that it predicts")
    stride = context if stride is None else stride
    fix = f"must be from 1 to the context of {context}, or tokens between two windows would be left out"
    require(1 <= stride <= context, "stride", stride, fix)
    require_at_least_1("batch_size", batch_size)
    require(len(ids) >= 2, "ids", len(ids), "a text of fewer than two tokens has none to predict")

    array = np.asarray(ids, np.int32)
    bounds = _bounds(len(array), context, stride)
    return _batched((_window(array, *each, context) for each in bounds), batch_size, context - 1)


def _bounds(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first token, end, first token that counts) of every window."""
    counted = 0
    for begin in itertools.count(0, stride):
        end = min(begin + context, length)
        yield begin, end, counted
        if end == length:
            return
        counted = end


def _window(ids: np.ndarray, begin: int, end: int, counted: int, context: int) -> dict[str, np.ndarray]:
    """One window as a row of L - 1 inputs, padded on the right."""
    size, width = end - begin - 1, context - 1
    row = {name: np.zeros(width, np.int32) for name in ("tokens", "targets", "positions", "segments")}
    row["tokens"][:size], row["targets"][:size] = ids[begin : end - 1], ids[begin + 1 : end]
    row["positions"][:size], row["segments"][:size] = np.arange(size), 1

    weights = np.zeros(width, np.float32)
    weights[max(counted - begin - 1, 0) : size] = 1.0
    return {**row, "weights": weights}


def _batched(
    rows: Iterable[dict[str, np.ndarray]], batch_size: int, width: int
) -> Iterator[dict[str, np.ndarray]]:
    """Rows as batches of one shape; the last one is filled up with rows that do not count."""
    rows = iter(rows)
    while some := list(itertools.islice(rows, batch_size)):
        empty = {name: np.zeros(width, values.dtype) for name, values in some[0].items()}
        whole = [*some, *[empty] * (batch_size - len(some))]
        yield {name: np.stack([row[name] for row in whole]) for name in empty}

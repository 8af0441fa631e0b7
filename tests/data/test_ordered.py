"""A text in order: every token counts once, in the first window that predicts it."""

import numpy as np
import pytest

from elastic_lm.data.ordered import windows


@pytest.mark.parametrize("length", [2, 9, 10, 11, 37, 40, 41])
@pytest.mark.parametrize(("context", "stride"), [(10, 10), (10, 4), (10, 1), (2, 1)])
def test_every_token_counts_once_with_all_the_context_that_there_is(
    length: int, context: int, stride: int
) -> None:
    ids = list(range(100, 100 + length))
    seen: dict[int, int] = {}
    for batch in windows(ids, context, stride, batch_size=3):
        assert all(array.shape == (3, context - 1) for array in batch.values())
        for row in range(3):
            for column in np.flatnonzero(batch["weights"][row]):
                target = int(batch["targets"][row, column])
                assert batch["tokens"][row, column] == target - 1  # the token before it
                assert batch["segments"][row, column] == 1
                assert target not in seen
                seen[target] = int(batch["positions"][row, column]) + 1  # tokens that it looks back on

    skipped = {100 + n for n in range(0, length, context)} if stride == context else {100}
    assert set(seen) == set(ids) - skipped
    late = {target: context_ for target, context_ in seen.items() if target >= 100 + context}
    assert all(found >= context - stride for found in late.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2, 3], 1), "context=1: must be at least 2"),
        (([1, 2, 3], 4, 5), "stride=5: must be from 1 to the context of 4"),
        (([1, 2, 3], 4, 0), "stride=0: must be from 1"),
        (([1], 4), "ids=1: a text of fewer than two tokens"),
    ],
)
def test_what_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows(*arguments)

"""What `bench real` refuses to call a measurement."""

import numpy as np
import pytest

from elastic_lm.bench.real import without_first


def test_the_first_token_is_taken_off() -> None:
    np.testing.assert_allclose(without_first([3.0, 4.0], [1.0, 9.0, 2.0]), [1.0, 2.0])


def test_a_round_that_was_held_up_gets_the_median_of_the_others() -> None:
    np.testing.assert_allclose(without_first([3.0, 0.5, 5.0], [1.0]), [2.0, 3.0, 4.0])


def test_calls_that_are_all_jitter_are_no_measurement() -> None:
    with pytest.raises(ValueError, match=r"0.0100 s took no longer than one for a single token, 0.0200 s"):
        without_first([0.03, 0.01], [0.02])

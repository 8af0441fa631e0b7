"""Bookkeeping of the window: which positions wait for which layers, in any order of exits and ticks."""

import functools

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.decode.loop import ring_write
from elastic_lm.decode.lossless import final_length
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.state import DecodeState
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.models.decoder import Decoder
from elastic_lm.testing import random_params, tiny_config

WINDOW, NEW = 3, 7
CONFIG = tiny_config(exits=(1, 2), n_layers=3)
PARAMS = random_params(CONFIG)
properties = functools.partial(settings, derandomize=True, deadline=None)


@properties(max_examples=40)
@given(
    shape=st.sampled_from([(1, 1), (3, 1), (3, 2), (4, 4)]),
    starts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    counts=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_a_state_lies_in_the_slot_of_its_position(
    shape: tuple[int, int], starts: tuple[int, int], counts: tuple[int, int]
) -> None:
    window, width = shape
    counts = tuple(min(count, window, width) for count in counts)
    ring = -1.0 - np.arange(2 * window).reshape(2, window, 1)
    new = 1.0 + np.arange(2 * width).reshape(2, width, 1)

    wanted = ring.copy()
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for i in range(count):
            wanted[row, (start + i) % window] = new[row, i]

    arrays = (jnp.asarray(starts, jnp.int32), jnp.asarray(counts, jnp.int32))
    assert np.array_equal(ring_write(jnp.asarray(ring), jnp.asarray(new), *arrays), wanted)


def check_positions(state: DecodeState, prompts: list[list[int]]) -> None:
    """What holds between two iterations, in every row."""
    length, done = np.asarray(state.length), np.asarray(state.done)
    assert (length >= done[0]).all()
    assert (np.diff(done, axis=0) <= 0).all()
    assert (done[0] - done[-1] <= WINDOW).all()
    assert (length <= np.asarray(state.limit)).all()
    assert (length >= [len(prompt) for prompt in prompts]).all()


thresholds = st.sampled_from([0.0, 0.02, 0.05, 0.2, 2.0])


@properties(max_examples=12)
@given(
    policies=st.lists(st.tuples(thresholds, thresholds), min_size=2, max_size=2),
    lossless=st.lists(st.booleans(), min_size=2, max_size=2),
    fire_share=st.sampled_from([0.0, 0.6, 1.0]),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_positions_stay_in_order_and_rows_independent(
    policies: list[tuple[float, float]],
    lossless: list[bool],
    fire_share: float,
    lengths: tuple[int, int],
) -> None:
    # One row is always verified, so that one program serves all examples.
    verified = [*lossless, True]
    asked = [ConfidenceExit("max_prob", pair, (1, 2)) for pair in [*policies, policies[0]]]
    prompts = [[1 + i for i in range(length)] for length in (*lengths, lengths[0])]
    sampler = Sampler(Decoder(CONFIG), PARAMS, window=WINDOW, fire_share=fire_share)

    call, state, controls = sampler._prefill(sampler._call(prompts, exit=asked, lossless=verified), NEW)
    model, before = call.served, np.zeros(3, int)
    for _ in range(20 * NEW):
        state = model.run(model.config, model.params, state, controls, 1, call.mode)
        check_positions(state, prompts)
        final = np.asarray(final_length(state, controls))
        assert (final >= before).all()
        before = final
        if not np.any(state.alive):
            break
    assert not np.any(state.alive)
    assert (np.asarray(state.length) == [len(prompt) + NEW for prompt in prompts]).all()

    # The last row is the first one again, verified: with the thresholds of full depth both are the same text.
    rows = np.asarray(state.tokens)
    full = sampler.sample(prompts, NEW, exit=None, lossless=[False, False, True])
    for row, prompt in enumerate(prompts):
        if verified[row]:
            assert rows[row, len(prompt) : len(prompt) + NEW].tolist() == full[row].tokens

"""What a round costs in which a sub-network drafts and the whole model verifies, measured on this device.

With w_1 < w_2 < ... < W the widths for which verification is compiled, c_s the time of one step of the
sub-network and v(w) that of a verification, a round with k drafts takes

    c_k = k c_s + v(least w_i > k)

The rounds with w_i - 1 drafts are timed, and one with the fewest drafts that are verified in the widest
window, which gives c_s. The programs are those that the call itself needs: nothing else is compiled.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.decode.drafting import tick_widths, with_drafting
from elastic_lm.decode.sampling import truncates
from elastic_lm.decode.served import Served
from elastic_lm.decode.state import Controls, DecodeState

ROUNDS = 3  # timings of every kind of round, in turns
AT_ONCE, MOST_AT_ONCE = 0.01, 32  # seconds that one timing takes at least, in so many rounds at most
TEXT = 8  # tokens of the text before the rounds that are timed

_measured: dict[tuple[Any, ...], tuple[float, ...]] = {}


def drafter_costs(
    model: Served, prefill: Callable[..., DecodeState], controls: Controls, shape: tuple[int, ...]
) -> tuple[float, ...]:
    """Seconds of a round with 0 .. W - 1 drafts.

    They are measured at the first call for a model, a drafter, a batch size, a capacity and a way to draw,
    and remembered for the life of the process.

    Args:
      model: what runs, with its drafter.
      prefill: of the call, with everything static given.
      controls: of the call.
      shape: (B, P) of its padded prompts.
    """
    places = frozenset(getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(model.params))
    greedy = not bool(jnp.any(controls.sampling.temperature > 0))
    cuts = bool(jnp.any(truncates(controls.sampling)))
    key = (model.config, model.drafter, places, shape[0], controls.thresholds.shape[2], greedy, cuts)
    key += (controls.tick_costs.shape[0], jax.devices()[0].device_kind)
    if key not in _measured:
        _measured[key] = _measure(model, prefill, controls, shape)
    return _measured[key]


def _measure(
    model: Served, prefill: Callable[..., DecodeState], controls: Controls, shape: tuple[int, ...]
) -> tuple[float, ...]:
    window, capacity = controls.tick_costs.shape[0], controls.thresholds.shape[2]
    room = capacity - window - TEXT
    begun = prefill(
        jnp.ones(shape, jnp.int32),
        jnp.full(shape[:1], TEXT, jnp.int32),
        jnp.full(shape[:1], TEXT + max(room, window + 1), jnp.int32),
        jnp.int32(1),
    )
    begun = with_drafting(begun, window)
    # Every row drafts as many tokens as it is told, whatever they are, and no token ends the text.
    forced = dataclasses.replace(
        controls,
        adapt=jnp.asarray(False),
        lossless=jnp.ones_like(controls.lossless),
        stop_tokens=jnp.full_like(controls.stop_tokens, -1),
    )

    def run(drafts: int, rounds: int) -> float:
        state = dataclasses.replace(begun, draft=jnp.full_like(begun.draft, drafts))
        state = jax.tree.map(jnp.copy, state)  # what runs is donated
        jax.block_until_ready(state)
        started = time.perf_counter()
        # The rounds are a Python number, as calls give it: an array would compile another program.
        jax.block_until_ready(model.run(model.config, model.params, state, forced, rounds, "verify"))
        return time.perf_counter() - started

    run(0, 1)  # compiles
    at_once = math.ceil(min(AT_ONCE / run(0, 1), MOST_AT_ONCE))

    def seconds(drafts: int) -> float:
        """One of several rounds, without what a call costs that runs none."""
        count = max(min(at_once, room // (drafts + 1)), 1)
        return (run(drafts, count) - run(drafts, 0)) / count

    kinds = timed_drafts(window)
    rounds = [[seconds(kind) for kind in kinds] for _ in range(ROUNDS)]
    timed = {
        k: max(statistics.median(c), 1e-9) for k, c in zip(kinds, zip(*rounds, strict=True), strict=True)
    }
    return by_drafts(timed, window)


def timed_drafts(window: int) -> tuple[int, ...]:
    """Numbers of drafts whose rounds are timed: the most for every width, and the fewest for the widest."""
    widths = tick_widths(window)
    ends = [width - 1 for width in widths]
    fewest = widths[-2] if len(widths) > 1 else 0
    return tuple(sorted({*ends, fewest}))


def by_drafts(timed: dict[int, float], window: int) -> tuple[float, ...]:
    """Seconds of rounds with 0 .. W - 1 drafts from those of `timed_drafts`.

    Args:
      timed: seconds by the number of drafts.
      window: W.
    """
    widths: Sequence[int] = tick_widths(window)
    fewest = widths[-2] if len(widths) > 1 else 0
    # Two rounds of one width differ by the steps of the sub-network alone; in windows of so few positions
    # that there are none, each step is taken to cost what it adds together with its position.
    most = window - 1
    step = max(timed[most] - timed[fewest], 0.0) / max(most - fewest, 1)
    costs = []
    for k in range(window):
        top = next(width for width in widths if width > k) - 1
        # More drafts never take less time, whatever a busy machine shows.
        costs.append(max(timed[top] - (top - k) * step, costs[-1] if costs else 1e-9))
    return tuple(costs)

"""What an iteration of the decode loop costs by the positions it runs over, measured once on this device.

A pass over eight positions of a model that is read from memory costs far less than eight passes over one; how
much less depends on the device, the dtype, the batch and the model. `lookup` weighs it against what it
expects drafts to bring.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.decode import lookup
from elastic_lm.decode.served import Served
from elastic_lm.decode.state import Controls, DecodeState
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.models.decoder import Params

ROUNDS = 5  # timed iterations of every width, in turns
TEXT = 8  # tokens of the text, all the same, that is copied while iterations are timed

_measured: dict[tuple[Any, ...], tuple[float, ...]] = {}


def tick_costs(
    model: Served, prefill: Callable[..., DecodeState], controls: Controls, shape: tuple[int, ...]
) -> jax.Array:
    """Seconds of an iteration over 1 .. W positions per row.

    It is measured at the first call for a model and the place of its parameters, a batch size, a capacity and
    a way to draw, and remembered for the life of the process. The programs are those that the call itself
    needs: nothing else is compiled.

    Args:
      model: what runs.
      prefill: of the call, with everything static given.
      controls: of the call.
      shape: (B, P) of its padded prompts.

    Returns:
      [W] float32.
    """
    key = _key(
        model.config,
        model.params,
        batch=shape[0],
        capacity=controls.thresholds.shape[2],
        greedy=not bool(jnp.any(controls.sampling.temperature > 0)),
        window=controls.tick_costs.shape[0],
    )
    if key not in _measured:
        _measured[key] = _measure(model, prefill, controls, shape)
    return jnp.asarray(_measured[key], jnp.float32)


def _measure(
    model: Served, prefill: Callable[..., DecodeState], controls: Controls, shape: tuple[int, ...]
) -> tuple[float, ...]:
    window = controls.tick_costs.shape[0]
    begun = prefill(
        jnp.ones(shape, jnp.int32),
        jnp.full(shape[:1], TEXT, jnp.int32),
        jnp.full(shape[:1], TEXT + window + 1, jnp.int32),
        jnp.int32(1),
    )
    # Every row drafts as many tokens as it is told, no exit is looked at, and no token ends the text.
    forced = dataclasses.replace(
        controls,
        adapt=jnp.asarray(False),
        lossless=jnp.ones_like(controls.lossless),
        thresholds=jnp.full_like(controls.thresholds, NEVER_EXITS),
        stop_tokens=jnp.full_like(controls.stop_tokens, -1),
    )

    def seconds(width: int, iterations: int) -> float:
        drafts = jnp.full_like(begun.draft, width - 1)
        state = jax.tree.map(jnp.copy, dataclasses.replace(begun, draft=drafts))  # what runs is donated
        jax.block_until_ready(state)
        started = time.perf_counter()
        jax.block_until_ready(model.run(model.config, model.params, state, forced, iterations, "verify"))
        return time.perf_counter() - started

    widths = lookup.tick_widths(window)
    seconds(1, 1)  # compiles

    # One iteration after the other, in turns, without what a call costs that runs none.
    rounds = [[seconds(width, 1) - seconds(width, 0) for width in widths] for _ in range(ROUNDS)]
    by_width = [max(statistics.median(column), 1e-9) for column in zip(*rounds, strict=True)]
    return tuple(by_width[sum(width < t for width in widths)] for t in range(1, window + 1))


def measured_costs(
    config: ModelConfig, params: Params, *, batch: int, capacity: int, greedy: bool, window: int
) -> tuple[float, ...]:
    """What `tick_costs` has measured for a model in this process: seconds of 1 .. W positions per row.

    Raises:
      KeyError: nothing of the kind has run.
    """
    return _measured[_key(config, params, batch=batch, capacity=capacity, greedy=greedy, window=window)]


def _key(
    config: ModelConfig, params: Params, *, batch: int, capacity: int, greedy: bool, window: int
) -> tuple[Any, ...]:
    """What an iteration's time depends on: the caches grow with the capacity, and a mesh divides the work."""
    places = frozenset(getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    return config, places, batch, capacity, greedy, window, jax.devices()[0].device_kind

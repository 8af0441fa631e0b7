"""What an iteration of the decode loop costs by the positions it runs over, measured once on this device.

A pass over eight positions of a model that is read from memory costs far less than eight passes over one; how
much less depends on the device, the dtype, the batch and the model. `lookup` weighs it against what it
expects drafts to bring.

A search of the text costs c_s whatever the model: nothing beside a pass of a large one, much beside one of a
small one. Searches that bring nothing are therefore followed by rests of up to r iterations of full depth,

    r = min( ceil( c_s / (s c(1)) ) - 1, R ),

which bounds what they cost by a share s of the time as far as R allows. Where no number of drafts could pay
even if all of them were accepted, because (1 + k) / c(1 + k) is at most 1 / c(1) for every k, the rests are
the longest: measured times may be wrong, and only searches can show that.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.decode import lookup
from elastic_lm.decode.sampling import truncates
from elastic_lm.decode.served import Served
from elastic_lm.decode.state import Controls, DecodeState, segments
from elastic_lm.depth.confidence import NEVER_EXITS, metric_index
from elastic_lm.models.decoder import Params

ROUNDS = 5  # fewest timings of every kind of iteration, in turns
MOST_ROUNDS, SECONDS = 25, 0.5  # short ones are timed more often, for about so long
AT_ONCE, MOST_AT_ONCE = 0.01, 32  # seconds that one timing takes at least, in so many iterations at most
ENDLESS = 2**30  # iterations, of a rest that outlasts what is timed
TEXT = 8  # tokens of the text, all the same, that is copied while iterations are timed
SEARCH_SHARE = 0.01  # s, of the time that searches without success may take
LONGEST_REST = 64  # R
ALWAYS, UNREACHED = 0.0, 1.0  # thresholds at which every exit is taken, and at which it is looked at in vain
METRIC = "logit_margin"  # a metric of logits that never reaches 1


@dataclasses.dataclass(frozen=True)
class TickCosts:
    """Measured times of iterations.

    Attributes:
      by_width: seconds of an iteration over 1 .. W positions per row; over one position without a search.
      search: seconds of a search that brings nothing.
      look: seconds of a look at one exit.
      segment_shares: shares of the segments in an iteration over one position; () where they are not known.
    """

    by_width: tuple[float, ...]
    search: float = 0.0
    look: float = 0.0
    segment_shares: tuple[float, ...] = ()

    @property
    def longest_rest(self) -> int:
        """Most iterations between two searches that bring nothing."""
        plain = self.by_width[0]
        if all(width * plain <= cost for width, cost in enumerate(self.by_width, 1)):
            return LONGEST_REST
        return min(max(math.ceil(self.search / (SEARCH_SHARE * plain)) - 1, 0), LONGEST_REST)

    def put(self, controls: Controls) -> Controls:
        """The controls with these costs."""
        return dataclasses.replace(
            controls,
            tick_costs=jnp.asarray(self.by_width, jnp.float32),
            longest_rest=jnp.int32(self.longest_rest),
            segment_shares=jnp.asarray(self.segment_shares or controls.segment_shares, jnp.float32),
            look_cost=jnp.float32(self.look / self.by_width[0]),
        )


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A kind of iteration: tokens drafted before it, whether it searches, and the threshold of all exits."""

    drafts: int
    searches: bool = True
    threshold: float = NEVER_EXITS


_measured: dict[tuple[Any, ...], TickCosts] = {}


def tick_costs(
    model: Served, prefill: Callable[..., DecodeState], controls: Controls, shape: tuple[int, ...]
) -> TickCosts:
    """Seconds of an iteration over 1 .. W positions per row, and of a search.

    It is measured at the first call for a model and the place of its parameters, a batch size, a capacity and
    a way to draw, and remembered for the life of the process. The programs are those that the call itself
    needs: nothing else is compiled.

    Args:
      model: what runs.
      prefill: of the call, with everything static given.
      controls: of the call.
      shape: (B, P) of its padded prompts.

    Returns:
      The costs.
    """
    key = _key(
        model.config,
        model.params,
        batch=shape[0],
        capacity=controls.thresholds.shape[2],
        greedy=not bool(jnp.any(controls.sampling.temperature > 0)),
        truncates=bool(jnp.any(truncates(controls.sampling))),
        window=controls.tick_costs.shape[0],
    )
    if key not in _measured:
        _measured[key] = _measure(model, prefill, controls, shape)
    return _measured[key]


def _measure(
    model: Served, prefill: Callable[..., DecodeState], controls: Controls, shape: tuple[int, ...]
) -> TickCosts:
    window, capacity = controls.tick_costs.shape[0], controls.thresholds.shape[2]
    room = capacity - window - TEXT  # for the tokens of all iterations but one, whose window may be the last
    begun = prefill(
        jnp.ones(shape, jnp.int32),
        jnp.full(shape[:1], TEXT, jnp.int32),
        jnp.full(shape[:1], TEXT + max(room, window + 1), jnp.int32),
        jnp.int32(1),
    )
    begun_lookup = begun.lookup
    assert begun_lookup is not None
    # Every row drafts as many tokens as it is told, whatever they are, and no token ends the text.
    forced = dataclasses.replace(
        controls,
        adapt=jnp.asarray(False),
        measuring=jnp.asarray(True),
        lossless=jnp.ones_like(controls.lossless),
        stop_tokens=jnp.full_like(controls.stop_tokens, -1),
        longest_rest=jnp.int32(0),
        # A look reads the vocabulary head, whatever the policy of the call that comes first.
        metric=jnp.int32(metric_index(METRIC)),
        gates=jnp.zeros_like(controls.gates),
        together=jnp.asarray(False),
    )

    def run(kind: _Kind, iterations: int) -> float:
        state = dataclasses.replace(
            begun,
            draft=jnp.full_like(begun.draft, kind.drafts),
            # Like the array that it replaces, placement included: another one would compile another program.
            lookup=dataclasses.replace(
                begun_lookup, rest=jnp.full_like(begun_lookup.rest, 0 if kind.searches else ENDLESS)
            ),
        )
        state = jax.tree.map(jnp.copy, state)  # what runs is donated
        thresholds = jnp.full_like(controls.thresholds, kind.threshold)
        # The iterations are a Python number, as calls give it: an array would compile another program.
        how = dataclasses.replace(forced, thresholds=thresholds), iterations, "verify"
        jax.block_until_ready((state, thresholds))
        started = time.perf_counter()
        jax.block_until_ready(model.run(model.config, model.params, state, *how))
        return time.perf_counter() - started

    def seconds(kind: _Kind) -> float:
        """One of several iterations, without what a call costs that runs none."""
        # Every iteration gives 1 .. drafts + 1 tokens; those of exits last until the window is full.
        most = window - 2 if kind.threshold == ALWAYS else room // (kind.drafts + 1)
        count = max(min(iterations, most), 1)
        return (run(kind, count) - run(kind, 0)) / count

    # One position without a search and with one, more positions, a look at every exit that is not confident,
    # and one at the lowest exit, at which the iteration ends.
    widths = lookup.tick_widths(window)
    parts = segments(model.config)
    kinds = [_Kind(0, searches=False), *(_Kind(width - 1) for width in widths)]
    if len(parts) > 1:
        kinds += [_Kind(window - 1, searches=False, threshold=edge) for edge in (UNREACHED, ALWAYS)]

    # Iterations that are shorter than the jitter of a call are timed several at a time.
    run(kinds[0], 1)  # compiles
    iterations = math.ceil(min(AT_ONCE / run(kinds[0], 1), MOST_AT_ONCE))
    started = time.perf_counter()
    rounds = [[seconds(kind) for kind in kinds]]
    count = min(max(SECONDS / (time.perf_counter() - started), ROUNDS), MOST_ROUNDS)
    rounds += [[seconds(kind) for kind in kinds] for _ in range(round(count) - 1)]

    plain, searching, *others = (max(statistics.median(column), 1e-9) for column in zip(*rounds, strict=True))
    # More positions never take less time, whatever a busy machine shows.
    by_width = list(itertools.accumulate([plain, *others[: len(widths) - 1]], max))
    look, shares = 0.0, (1.0,)
    if len(parts) > 1:
        looking, shallow = others[len(widths) - 1 :]
        look = max(looking - plain, 0.0) / (len(parts) - 1)
        # The segments above the lowest share the rest of the time by their layers.
        lowest = min(max(shallow - look, 0.0) / plain, 1.0)
        above = parts[-1][1] - parts[0][1]
        shares = (lowest, *((1.0 - lowest) * (stop - start) / above for start, stop in parts[1:]))
    return TickCosts(
        by_width=tuple(by_width[sum(width < t for width in widths)] for t in range(1, window + 1)),
        search=max(searching - plain, 0.0),
        look=look,
        segment_shares=shares,
    )


def measured_costs(
    config: ModelConfig,
    params: Params,
    *,
    batch: int,
    capacity: int,
    greedy: bool,
    window: int,
    truncates: bool = False,
) -> tuple[float, ...]:
    """What `tick_costs` has measured for a model in this process: seconds of 1 .. W positions per row.

    Raises:
      KeyError: nothing of the kind has run.
    """
    key = _key(
        config, params, batch=batch, capacity=capacity, greedy=greedy, truncates=truncates, window=window
    )
    return _measured[key].by_width


def _key(
    config: ModelConfig,
    params: Params,
    *,
    batch: int,
    capacity: int,
    greedy: bool,
    truncates: bool,
    window: int,
) -> tuple[Any, ...]:
    """What an iteration's time depends on: the caches grow with the capacity, and a mesh divides the work."""
    places = frozenset(getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    return config, places, batch, capacity, greedy, truncates, window, jax.devices()[0].device_kind

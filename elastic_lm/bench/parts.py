"""What the parts of a decode iteration take on this device, measured by the loop's own programs.

A loop over a model with one exit is forced to do what is to be timed: thresholds by position let every token
leave (A seconds of an iteration: the lowest segment and a look at the exit's head), or let w - 1 tokens leave
and hold back the next, so that every w-th iteration ends in a deep tick over w positions:

    t_w = n A + (n / w) D_w            n iterations, n a multiple of w
    t_1' = n (S + D_1)                 the same with an exit that is never looked at

which gives A, the look L = A - S and the deep ticks D_w. The model without exits gives F, and F' with a
preview in place of the head. Passes of rows that look up are timed by `decode.tick_costs`. Sides take turns,
and everything is taken relative to F of the same round, because a machine slows down and speeds up while it
measures.

Where the exit lies elsewhere, layers move from one side to the other: with l_w the time of a layer over w
positions, S(e) = S + (e - e0) l_1 and D_w(e) = D_w - (e - e0) l_w.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.decode.loop import tick_widths
from elastic_lm.decode.lossless import look_deep
from elastic_lm.decode.schedule import Iteration, Schedule
from elastic_lm.decode.segment import PREVIEW
from elastic_lm.decode.served import Served, jit_prefill, jit_run
from elastic_lm.decode.settings import SMALLEST_BUCKET, Settings, make_controls
from elastic_lm.decode.state import Controls, DecodeState, Mode
from elastic_lm.decode.tick_costs import METRIC, TickCosts, tick_costs
from elastic_lm.depth.confidence import NEVER_EXITS, metric_index
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.nn.preview import HeadPreview

ROUNDS = 5
PROMPT = 8  # tokens of the text that iterations go on from
HEAD_CALLS = 4  # heads of one timed call


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the time of an iteration depends on beside the model.

    Attributes:
      batch: rows, B.
      capacity: positions of the caches, S.
      window: W.
    """

    batch: int
    capacity: int
    window: int


@dataclasses.dataclass(frozen=True)
class ExitParts:
    """Seconds of the parts of a model with one exit.

    Attributes:
      layer: the exit's.
      shallow: S, the lowest segment over one position per row, and what every iteration costs beside.
      look: L, the exit's head and confidence.
      deep: D_w by w: the other layers over w positions per row, and the model's own head for one of them.
    """

    layer: int
    shallow: float
    look: float
    deep: Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Seconds of the parts of an iteration.

    Attributes:
      n_layers: of the model.
      full: F, the model without exits, one token per row.
      previewed: F' by the name of a preview, for tokens of which it is sure.
      ticks: of lossless rows that look up; None = not measured.
      verifying: by w, what the model's own head takes longer over w positions per row than over one.
      exit: None = not measured.
    """

    n_layers: int
    full: float
    previewed: Mapping[str, float]
    ticks: TickCosts | None
    verifying: Mapping[int, float]
    exit: ExitParts | None

    @property
    def head(self) -> float:
        """The vocabulary head, read once."""
        return self.exit.look if self.exit else 0.0

    @property
    def passes(self) -> tuple[float, ...]:
        """Iterations of lossless rows that look up, by 1 .. W positions; () = not measured.

        Searches that bring nothing are left out: `tick_costs` keeps them to a hundredth of the time.
        """
        if self.ticks is None:
            return ()
        plain = self.ticks.by_width[0]
        return tuple(self.full * cost / plain for cost in self.ticks.by_width)

    def layer(self, width: int) -> float:
        """A layer over so many positions per row."""
        assert self.exit is not None
        layers = self.n_layers - self.exit.layer
        if width == 1:
            # The difference of two programs, because a deep tick has costs of its own beside its layers.
            return max(self.full - self.exit.deep[1], 0.0) / self.exit.layer
        return self.layer(1) + max(self.exit.deep[width] - self.exit.deep[1], 0.0) / layers

    def at(self, layer: int) -> ExitParts:
        """The parts with the exit after another layer."""
        assert self.exit is not None
        moved = layer - self.exit.layer
        # On a busy machine a layer can seem to take longer than the tick that it is a part of.
        deep = {
            width: max(seconds - moved * self.layer(width), 0.0) for width, seconds in self.exit.deep.items()
        }
        return ExitParts(layer, self.exit.shallow + moved * self.layer(1), self.exit.look, deep)

    def seconds(
        self,
        schedule: Schedule,
        *,
        layer: int | None = None,
        lookup: bool = False,
        lossless: bool = False,
        preview: str | None = None,
        unsure: float = 0.0,
    ) -> float:
        """What a schedule takes.

        Args:
          schedule: from `decode.schedule.foresee`.
          layer: of the exit; None = the schedule is of a model without.
          lookup: rows look up.
          lossless: deep ticks verify.
          preview: name of the preview that takes the place of the model's own head.
          unsure: share of the iterations in which the head is read nevertheless, for one of the rows.

        Returns:
          Seconds.
        """
        saved = 0.0 if preview is None else self.full - self.previewed[preview]
        total = 0.0
        for iteration, count in schedule.iterations.items():
            if layer is None:
                one = self.passes[iteration.shallow - 1] if lookup else self.full
                one -= saved - unsure * self.head if iteration.final else 0.0
            else:
                how = {"lossless": lossless, "saved": saved, "unsure": unsure}
                one = self._with_exit(iteration, self.at(layer), **how)
            total += count * one
        return total

    def _with_exit(
        self,
        iteration: Iteration,
        parts: ExitParts,
        *,
        lossless: bool,
        saved: float,
        unsure: float,
    ) -> float:
        """Seconds of an iteration of a model with an exit; `saved` is what a preview saves of a head."""
        total = 0.0
        if iteration.shallow:
            total += parts.shallow + parts.layer * (self.layer(iteration.shallow) - self.layer(1))
        if iteration.looked:
            total += parts.look - saved
        if iteration.deep:
            total += parts.deep[iteration.deep]
            if lossless:
                total += self.verifying[iteration.deep]
            else:
                total += unsure * self.head - saved if iteration.final else -self.head
        return total


def measure_parts(
    config: ModelConfig,
    params: Params,
    shape: Shape,
    *,
    with_exit: tuple[ModelConfig, Params] | None = None,
    previews: Mapping[str, HeadPreview] | None = None,
    lookup: bool = True,
    rounds: int = ROUNDS,
) -> Parts:
    """Times the parts of an iteration, greedy.

    Args:
      config: the model without exits; static.
      params: its canonical parameters.
      shape: rows, capacity and window of what is forecast.
      with_exit: the same model with one exit; None = exits are not measured.
      previews: of its head, by name.
      lookup: passes of rows that look up are measured, too.
      rounds: timed calls per side.

    Returns:
      Medians over the rounds.

    Raises:
      ValueError: the window is below 2, or the capacity has no room for what is timed.
    """
    window = shape.window
    longest = PROMPT + max(2 * window, 4) + 1
    if window < 2 or longest + window > shape.capacity:
        need = f"need a window of at least 2 and a capacity of at least {longest + window}"
        raise ValueError(f"window={window}, capacity={shape.capacity}: {need}")

    sides: dict[str, tuple[Callable[[], float], int]] = {}  # name -> (seconds of a call, iterations)

    def add(name: str, program: "_Program", controls: Controls, iterations: int) -> None:
        sides[name] = functools.partial(program.seconds, controls, iterations), iterations

    full = _Program(config, params, shape, longest)
    add("full", full, full.controls, window)
    same: dict[tuple[int, ...], str] = {}  # previews that differ in their margins alone take as long
    named: dict[str, str] = {}
    for name, preview in (previews or {}).items():
        sizes = preview.rank, preview.blocks, preview.block
        named[name] = same.setdefault(sizes, f"preview {name}")
        if named[name] in sides:
            continue
        sure = dataclasses.replace(preview, margin=jnp.float32(-jnp.inf), head="")
        previewed = _Program(config, {**params, PREVIEW: sure}, shape, longest)
        add(f"preview {name}", previewed, previewed.controls, window)

    ticks = None
    if lookup:
        looking = _Program(config, params, shape, longest, mode="verify", lookup=True)
        ticks = looking.costs()

    widths = tick_widths(window)
    if with_exit is not None:
        program = _Program(*with_exit, shape, longest)
        add("leave", program, program.forced(lambda i: True), window - 1)
        add("never", program, program.controls, window)
        for width in widths:
            forced = program.forced(lambda i, width=width: i % width < width - 1)
            add(f"deep {width}", program, forced, width * max(1, round(window / width)))
        heads = {f"head {w}": functools.partial(_head_seconds, config, params, shape, w) for w in widths}
        sides |= {name: (run, HEAD_CALLS) for name, run in heads.items()}

    seconds = _in_turns({name: run for name, (run, _) in sides.items()}, rounds)
    # Relative to full depth in the same round; the median of full depth is the unit at last.
    unit = np.median(seconds["full"]) / window
    each = {
        name: float(np.median(values / seconds["full"])) * window * unit / sides[name][1]
        for name, values in seconds.items()
    }

    found = None
    if with_exit is not None:
        layer = with_exit[0].exits[0].layer
        deep = {w: max((each[f"deep {w}"] - each["leave"]) * w, 0.0) for w in widths}
        shallow = min(each["never"] - deep[1], each["leave"])
        found = ExitParts(layer, shallow, each["leave"] - shallow, deep)
    verifying = {w: max(each[f"head {w}"] - each["head 1"], 0.0) for w in widths} if with_exit else {}
    previewed_seconds = {name: each[side] for name, side in named.items()}
    return Parts(config.n_layers, each["full"], previewed_seconds, ticks, verifying, found)


class _Program:
    """The loop of a model, ready to run any number of iterations from the same state."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        shape: Shape,
        longest: int,
        mode: Mode = "exact",
        lookup: bool = False,
    ) -> None:
        self.model = Served(None, config, params, jit_prefill, jit_run)
        self.shape, self.mode = shape, mode
        self.prefill = functools.partial(
            jit_prefill, config, params, capacity=shape.capacity, window=shape.window, lookup=lookup
        )
        self.controls = make_controls(
            config, [[1] * PROMPT] * shape.batch, longest - PROMPT, shape.capacity,
            Settings(ignore_eos=True), [None] * shape.batch,
            lossless=np.full(shape.batch, mode == "verify"), adapt=False, fire_share=0.0, together=False,
            tick_costs=(1.0,) * shape.window,
        )  # fmt: skip
        ones = jnp.ones((shape.batch, SMALLEST_BUCKET), jnp.int32)
        rows = jnp.full(shape.batch, PROMPT, jnp.int32)
        # Rows that look up are told to draft nothing: a pass over one position.
        self.begun = self.prefill(ones, rows, jnp.full_like(rows, longest), jnp.int32(0 if lookup else 1))

    def forced(self, leaves: Callable[[int], bool]) -> Controls:
        """Controls under which the i-th new token leaves at the exit, or is looked at and goes deeper."""
        thresholds = np.full(self.controls.thresholds.shape, NEVER_EXITS, np.float32)
        for i in range(thresholds.shape[2] - PROMPT):
            thresholds[:, :, PROMPT - 1 + i] = 0.0 if leaves(i) else 1.0
        metric = jnp.int32(metric_index(METRIC))
        return dataclasses.replace(self.controls, thresholds=jnp.asarray(thresholds), metric=metric)

    def costs(self) -> TickCosts:
        """Times of passes of rows that look up, as the sampler measures them."""
        controls = dataclasses.replace(self.controls, adapt=jnp.asarray(True))
        return tick_costs(self.model, self.prefill, controls, (self.shape.batch, SMALLEST_BUCKET))

    def seconds(self, controls: Controls, iterations: int) -> float:
        """Seconds of so many iterations, without those of a call that runs none."""
        return self._call(controls, iterations) - self._call(controls, 0)

    def _call(self, controls: Controls, iterations: int) -> float:
        model = self.model
        state: DecodeState = jax.tree.map(jnp.copy, self.begun)  # what runs is donated
        jax.block_until_ready(state)
        began = time.perf_counter()
        jax.block_until_ready(model.run(model.config, model.params, state, controls, iterations, self.mode))
        return time.perf_counter() - began


def _in_turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """`timing.interleave` of functions that time themselves."""
    for run in sides.values():
        run()  # compiles, and warms the caches
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
            seconds[name].append(max(sides[name](), 1e-9))
    return {name: np.asarray(values) for name, values in seconds.items()}


def _head_seconds(config: ModelConfig, params: Params, shape: Shape, width: int) -> float:
    """Seconds of `HEAD_CALLS` heads over so many positions per row, each with its draw."""
    features = jnp.ones((shape.batch, width, config.d_model), config.dtype)
    began = time.perf_counter()
    jax.block_until_ready(_heads(config, params, features, shape.capacity, shape.window))
    return time.perf_counter() - began


@functools.partial(jax.jit, static_argnames=("config", "capacity", "window"))
def _heads(config: ModelConfig, params: Params, features: jax.Array, capacity: int, window: int) -> jax.Array:
    """`look_deep`, `HEAD_CALLS` times in a row. Static: config, capacity and window."""
    decoder = Decoder(config).bind({"params": params})
    batch, width, _ = features.shape
    sampling = Settings().arrays(batch)

    def look(_: int, features: jax.Array) -> jax.Array:
        deep = look_deep(
            decoder,
            features,
            jnp.zeros((batch, width), jnp.int32),
            newest_B=jnp.zeros(batch, jnp.int32),
            tokens_BS=jnp.zeros((batch, capacity), jnp.int32),
            sampling=sampling,
            window=window,
        )
        # Adds nothing; XLA does not know that, and reads the head again.
        return features + (deep[:, :1, None] > jnp.inf).astype(features.dtype) + (deep[:, -1:, None] < 0)

    return jax.lax.fori_loop(0, HEAD_CALLS, look, features)

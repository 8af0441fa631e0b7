"""The training loop: read, step, log, evaluate, save; stop at the first NaN or infinity."""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp

from elastic_lm.checkpoints.native import Checkpoints
from elastic_lm.models.decoder import Params
from elastic_lm.models.finite import check_finite
from elastic_lm.report.writers import Writer
from elastic_lm.train.config import TrainConfig
from elastic_lm.train.goodput import Goodput
from elastic_lm.train.losses import Metrics
from elastic_lm.train.method import Arrays
from elastic_lm.train.profiling import Profile
from elastic_lm.train.state import TrainState, abstract_state
from elastic_lm.train.step import EvalStep, TrainStep
from elastic_lm.train.together import SaveClock, agreed, preempted

REMEDY = (
    "lower train.lr, lengthen train.warmup or set train.clip, in a new workdir; checkpoints before that step "
    "are kept"
)
AT_ONCE = (
    "no update came before, and all weights are finite, so that the learning rate is not the cause: "
    "activations exceed what {dtype} holds (set train.dtype='bfloat16' or 'float32'), or labels or the "
    "method's options are out of range"
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a loop runs.

    Attributes:
      config: steps, logging, evaluation and saving.
      train_step: compiled.
      eval_step: compiled.
      held_out: makes the batches of one evaluation.
      place: puts a host batch on the mesh.
      per_step: tokens of a step, or of whatever `rate` says.
      rate: name of what is counted per second.
      remark: of the method: what the user should know about the first metrics; "" = nothing.
      extra: of the step whose metrics are logged, and of these: learning rate, memory, utilization.
      dtype: of the activations, for messages.
      stop: asked after every step: whether the state is to be saved and the run to end. Several processes
        do so together, after the next step at which something is written. SIGTERM, which jax hears there, has
        no need of that.
      goodput: divides the wall time.
      profile: traces some of the steps.
    """

    config: TrainConfig
    train_step: TrainStep
    eval_step: EvalStep
    held_out: Callable[[], Iterable[Arrays]]
    place: Callable[[Any], Any]
    per_step: int
    rate: str = "tokens_per_s"
    remark: Callable[[Mapping[str, float]], str] = lambda _: ""
    extra: Callable[[int, Mapping[str, float]], Mapping[str, float]] = lambda *_: {}
    dtype: str = "float32"
    stop: Callable[[], bool] = lambda: False
    goodput: Goodput = dataclasses.field(default_factory=Goodput)
    profile: Profile = dataclasses.field(default_factory=Profile)


class Stopped(Exception):
    """A run was asked to stop and has saved its state; running it again goes on from there.

    Example:
      ```python
      import tempfile

      import elastic_lm as el

      run = el.RunConfig(
          model=el.testing.tiny_config(vocab_size=300),
          data=el.DataConfig(source="stdlib", seq_len=32, batch_size=2),
          train=el.TrainConfig(steps=2, warmup=1, eval_batches=1),
      )
      with tempfile.TemporaryDirectory() as workdir:
          try:
              el.train.fit(run, workdir, stop=lambda: True)
          except el.train.Stopped as stopped:
              assert stopped.step == 1
          el.train.fit(run, workdir)
      ```
    """

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}, which is saved; run it again to go on")
        self.step = step


@dataclasses.dataclass
class _Window:
    """Metrics since the last line that was written."""

    began: float = dataclasses.field(default_factory=time.monotonic)
    steps: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def summary(self, per_step: int, rate: str) -> dict[str, float]:
        count = len(self.steps)
        mean = {name: sum(metrics[name] for metrics in self.steps) / count for name in self.steps[0]}
        seconds = time.monotonic() - self.began
        return {**mean, rate: count * per_step / seconds, "step_seconds": seconds / count}


def resume(
    checkpoints: Checkpoints, state: TrainState, batches: grain.DatasetIterator
) -> tuple[int, TrainState]:
    """Continues from the newest checkpoint, or from the beginning where there is none.

    Args:
      checkpoints: of this run.
      state: at step 0; its shapes, dtypes and shardings are those of what is restored.
      batches: a fresh data iterator; moved to the checkpoint's position.

    Returns:
      (steps done, state after them).

    Raises:
      ValueError: there are checkpoints and none can be read; see `Checkpoints.restore`.
    """
    restored = checkpoints.restore(abstract_state(state), batches)
    return (0, state) if restored is None else restored


def run(
    job: Job,
    start: int,
    state: TrainState,
    frozen: Params,
    *,
    batches: grain.DatasetIterator,
    checkpoints: Checkpoints,
    writer: Writer,
) -> tuple[TrainState, dict[str, float]]:
    """Trains from step `start` to the last one.

    Metrics of a step are read after the next one was sent off, so the device never waits; a
    checkpoint is written only when every step before it, and the state it holds, was finite. It is written
    while the next steps run, from a copy.

    Args:
      job: static parts.
      start: optimizer steps already in `state`.
      state: what trains; its memory is reused.
      frozen: parameters that do not train.
      batches: data iterator, standing at step `start`.
      checkpoints: where states go.
      writer: where metrics go.

    Returns:
      (final state, metrics of the last evaluation).

    Raises:
      FloatingPointError: loss, gradient or the state after a step is not finite; names the step.
        Checkpoints stay as they are.
      OSError: a checkpoint could not be written; raised at a later step, or at the end.
      Stopped: `job.stop` asked for it, before the last step; the state is saved.
      NotFiniteError: parameters that train are not finite before the first step; names the first.
    """
    check_finite("before the first step", state.params)  # what is frozen was checked when it was loaded
    config, window, pending = job.config, _Window(), None
    goodput = job.goodput
    evaluation: dict[str, float] = {}
    clock = SaveClock(config.save_minutes)

    def remedy(step: int) -> str:
        # The first step has seen no update, so that no learning rate can have spoilt its loss.
        return REMEDY if step > 1 else AT_ONCE.format(dtype=job.dtype)

    for step in range(start + 1, config.steps + 1):
        job.profile.before(step)
        with goodput.doing("data"):
            batch = job.place(next(batches))
        state, metrics = goodput.step(job.train_step, state, frozen, batch)
        window.began += job.profile.after(step, metrics)

        # The step just sent off runs while the metrics of the one before are read.
        if pending is not None:
            window.steps.append(_finite(step - 1, pending, remedy(step - 1)))
        pending = metrics
        with goodput.doing("checkpoint"):
            checkpoints.poll()

        last = step == config.steps
        due = last or any(step % every == 0 for every in _events(config))
        taken = preempted(step)
        stops, timed = (False, False) if last else agreed(job.stop(), clock.rings(), due)
        stops = stops or (taken and not last)
        if not (due or stops or timed):
            continue

        window.steps.append(_finite(step, pending, remedy(step)))
        pending = None
        if step % config.log_every == 0 or last:
            summary = window.summary(job.per_step, job.rate)
            writer.write(step, {**summary, **job.extra(step, summary)})
            window = _Window()
            if start == 0 and step <= config.log_every and (remark := job.remark(summary)):
                logging.warning("%s", remark)

        paused = time.monotonic()
        saves = last or stops or timed or step % config.save_every == 0
        if saves:
            _check_state(step, state)  # before the evaluation: a broken state is reported as such
        if last or (config.eval_every and step % config.eval_every == 0):
            with goodput.doing("evaluation"):
                evaluation = evaluate(job, state.params, frozen)
            writer.write(step, {f"eval_{name}": value for name, value in evaluation.items()})
        if saves:
            with goodput.doing("checkpoint"):
                checkpoints.save(step, state, batches)
                if stops or last:
                    checkpoints.settle()
            clock.restart()
        goodput.note(step)
        if stops:
            raise Stopped(step, config.steps)
        window.began += time.monotonic() - paused  # the rate that is logged is that of training alone

    return state, evaluation or evaluate(job, state.params, frozen)


def evaluate(job: Job, trainable: Params, frozen: Params) -> dict[str, float]:
    """Metrics over held-out batches.

    Args:
      job: its evaluation step runs on the first `eval_batches` of `held_out`, 0 = all.
      trainable: what trains, on the mesh.
      frozen: what does not.

    Returns:
      {name: mean weighted by the batches' counted tokens}; empty where there is no batch.
    """
    totals: dict[str, float] = {}
    tokens = 0.0
    for arrays in itertools.islice(job.held_out(), job.config.eval_batches or None):
        metrics, count = job.eval_step(trainable, frozen, job.place(arrays))
        tokens += float(count)
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) * float(count)

    return {name: total / max(tokens, 1.0) for name, total in totals.items()}


def _events(config: TrainConfig) -> list[int]:
    return [n for n in (config.log_every, config.eval_every, config.save_every) if n]


def _finite(step: int, metrics: Metrics, remedy: str) -> dict[str, float]:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise FloatingPointError(f"{name} is {values[name]} at step {step}: {remedy}")
    return values


def _check_state(step: int, state: TrainState) -> None:
    """Refuses a state that is not finite. Metrics of a step are those before its update."""
    if not all_finite(state):
        raise FloatingPointError(f"parameters are not finite after step {step}: {REMEDY}")


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Scalar bool: every number in the tree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))

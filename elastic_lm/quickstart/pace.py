"""How fast this machine runs a model, measured in moments, and the sizes of a run that follow from it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.bench.plan import Plan
from elastic_lm.decode import generated
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.fitting import FIT_TOKENS
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.quickstart.measure import FEWEST_ROUNDS
from elastic_lm.quickstart.options import Options
from elastic_lm.quickstart.report import NEAR
from elastic_lm.quickstart.settings import Setting
from elastic_lm.quickstart.train import CANDIDATES, EPOCHS

PLANNED_PROMPTS = 3  # that the plan continues
PLANNED_TOKENS = 24_000  # most tokens of a pass of the plan
LEAST_BATCHES = 8  # of a pass of the plan
LEAST_TOKENS = 2048  # of a held-out pass
MOST_PLAN_ROUNDS = 5
PROBE_TOKENS = 16  # generated to see how long a token takes

# Shares of the time that is left when a step begins.
LOOKUP, PASS, TUNING, HELD_OUT, COMPILING = 0.12, 0.08, 0.3, 0.08, 0.4


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds that a model takes on this machine.

    Attributes:
      per_token: of a token of given text, at full depth with its logits.
      per_step: of a generated token at full depth, batch 1.
      compiling: the programs that generate.
    """

    per_token: float
    per_step: float
    compiling: float


def measure_pace(decoder: Decoder, params: Params, prompt: list[int], row_tokens: int) -> Pace:
    """Runs the model at full depth over a row and for a few new tokens, each twice.

    Args:
      decoder: without exits.
      params: its canonical parameters.
      prompt: token ids.
      row_tokens: length of the row.
    """
    row = jnp.asarray([(prompt * row_tokens)[:row_tokens]], jnp.int32)

    def read() -> None:
        jax.block_until_ready(generated.full_choices(decoder.config, params, row))

    sampler = Sampler(decoder, params)
    probed = min(PROBE_TOKENS, decoder.config.max_len - len(prompt))

    def write() -> None:
        sampler.sample(prompt, probed, ignore_eos=True)

    _, reading = _twice(read)
    first, writing = _twice(write)
    return Pace(reading / row_tokens, writing / probed, max(first - writing, 0.0))


def _twice(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a first and of a second call."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1]


def for_plan(options: Options, pace: Pace, left: float) -> tuple[Options, int, int, int]:
    """Sizes of the plan.

    Args:
      options: of the run.
      pace: of the model.
      left: seconds.

    Returns:
      (options with as few rows per batch as the passes need, tokens of a pass, prompts and new tokens that
      are continued).
    """
    tokens = int(min(PLANNED_TOKENS, PASS * left / pace.per_token))
    rows = max(1, min(options.batch_size, tokens // (LEAST_BATCHES * options.seq_len)))

    # Every prompt is continued twice, as it is and repeated.
    steps = LOOKUP * left / 2 / pace.per_step
    new_tokens = int(min(options.new_tokens // 4, max(PROBE_TOKENS, steps / PLANNED_PROMPTS)))
    prompts = int(min(PLANNED_PROMPTS, max(1, steps / new_tokens)))
    return dataclasses.replace(options, batch_size=rows), tokens, prompts, new_tokens


def plan_rounds(pace: Pace, window: int, left: float) -> int:
    """Rounds in which the plan times the parts of an iteration, 1 to 5.

    Args:
      pace: of the model.
      window: W.
      left: seconds.
    """
    # Beside full depth and previews, about ten sides run as many iterations as the window is wide, and the
    # first round is not timed.
    return int(min(MOST_PLAN_ROUNDS, max(1, LOOKUP * left / (12 * window * pace.per_step) - 1)))


def for_tuning(
    options: Options, pace: Pace, plan: Plan, *, exits: int, vocab: int, left: float
) -> tuple[Options, int] | None:
    """Sizes of the training run.

    One batch in `EPOCHS` steps passes the frozen layers and the model's head. A step computes the heads of
    the model and of every exit over a part of the vocabulary, those of exits three times (forward, and the
    gradient's two products). The closed form is fitted on what the frozen layers gave.

    Args:
      options: of the run.
      pace: of the model.
      plan: knows the head's share.
      exits: that are tuned.
      vocab: tokens of the vocabulary.
      left: seconds.

    Returns:
      (options with the steps that fit, tokens that the closed form is fitted on before); None = there is no
      time for exits.
    """
    tokens = options.batch_size * options.seq_len
    part = min(1.0, CANDIDATES / vocab)
    per_step = tokens * pace.per_token * (1 / EPOCHS + plan.head * part * (1 + 3 * exits))
    steps = int((TUNING * left - 2 * pace.compiling) / per_step)
    if steps < 2:
        return None
    steps = min(options.steps, steps)
    return dataclasses.replace(options, steps=steps), min(FIT_TOKENS, max(steps // EPOCHS, 2) * tokens)


def for_held_out(options: Options, pace: Pace, left: float) -> Options:
    """Tokens of the passes that calibrate and test.

    Args:
      options: of the run.
      pace: of the model.
      left: seconds.
    """
    tokens = int(max(LEAST_TOKENS, HELD_OUT * left / pace.per_token))
    return dataclasses.replace(
        options,
        calibration_tokens=min(options.calibration_tokens, tokens),
        test_tokens=min(options.test_tokens, tokens),
    )


def compared(settings: Sequence[Setting], pace: Pace, left: float) -> list[Setting]:
    """The settings that there is time to compile: lookup, then those for targets that are nearest to 0.99.

    Args:
      settings: all of them.
      pace: of the model.
      left: seconds.

    Returns:
      At least one, where there is one, in their order.
    """
    most = max(1, int(COMPILING * left / max(pace.compiling, 1e-9)) - 1)  # full depth is compiled, too
    by_worth = sorted(settings, key=lambda s: (s.dial != "lookup", abs(s.target - NEAR)))
    return [s for s in settings if s in by_worth[:most]]


def for_timing(options: Options, pace: Pace, sides: int, left: float) -> tuple[Options, float]:
    """Sizes of the texts that are timed.

    Args:
      options: of the run.
      pace: of the model.
      sides: ways to decode that take turns.
      left: seconds.

    Returns:
      (options with the new tokens per prompt, so that a few prompts fit, seconds that timing may take: what
      is left but for comparing the texts with the full model and for writing).
    """
    timing = 0.9 * left - sides * pace.compiling
    steps = timing / FEWEST_ROUNDS / sides / pace.per_step
    new_tokens = int(min(options.new_tokens, max(PROBE_TOKENS, steps / min(options.prompts, 4))))
    # The texts are read once more by the full model, each as long as its prompt and what was generated.
    per_prompt = sides * (options.prompt_tokens + new_tokens) * pace.per_token
    reading = min(options.prompts * per_prompt, 0.1 * left)
    prompts = max(1, min(options.prompts, int(reading / per_prompt)))
    return dataclasses.replace(options, new_tokens=new_tokens, prompts=prompts), 0.9 * left - reading

"""Which drafter of a model gives most tokens per second on this device: searched, timed and forecast.

The model continues some prompts. Over that text, `width.draft_layers` finds the best drafter of several
costs, with the share a of its drafts that are right. One of them is timed (`decode.drafter_costs`), which
gives the time c_0 of a pass of the whole model, v(w) of a verification of w positions, and c_s of a step of
the drafter; a step of another one is taken to lie on the line through both, by the bytes of its layers.
With k drafts per round,

    tokens per second = (1 + a + a^2 + ... + a^k) / (k c_s + v(k + 1))

as if every draft were right with the same probability, whatever the ones before.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

from elastic_lm.bench.forecasts import continued
from elastic_lm.config.checks import require
from elastic_lm.config.drafter import Drafter
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import to_dict
from elastic_lm.cost.counted import Workload
from elastic_lm.decode.drafter_costs import drafter_costs
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.served import ServedModels
from elastic_lm.decode.settings import Settings, bucket, make_controls
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.exits import without_exits
from elastic_lm.width.draft_layers import DraftCandidate, search_drafters

TIMED_SHARE = 0.5  # of the layers' cost, nearest to which the drafter lies that is timed


@dataclasses.dataclass(frozen=True)
class DrafterForecast:
    """A drafter, and what it is forecast to give.

    Attributes:
      candidate: the drafter and its drafts.
      drafts: per round, with which it is fastest; 0 = none pays.
      speedup: tokens per second over those of full depth.
      step: seconds of a step of it.
    """

    candidate: DraftCandidate
    drafts: int
    speedup: float
    step: float


@dataclasses.dataclass(frozen=True)
class DrafterPlan:
    """Drafters of several costs.

    Attributes:
      forecasts: one per drafter, in order of cost.
      full: seconds of a pass of the whole model over one position per row.
      verifying: seconds of a pass over 1 .. W positions per row.
      tokens: of the text that they were compared on.
    """

    forecasts: tuple[DrafterForecast, ...]
    full: float
    verifying: tuple[float, ...]
    tokens: int

    @property
    def best(self) -> DrafterForecast:
        """The drafter with the largest forecast."""
        return max(self.forecasts, key=lambda one: (one.speedup, one.candidate.acceptance))

    @property
    def verdict(self) -> str:
        """In words."""
        best, candidate = self.best, self.best.candidate
        what = f"{describe(candidate.drafter)} ({candidate.share:.0%} of the layers' bytes)"
        right = f"{candidate.acceptance:.0%} of its drafts are right"
        if best.drafts:
            return f"draft {best.drafts} with {what}: {right}, forecast {best.speedup:.2f}x full depth"
        cheap = f"a step takes {best.step / self.full:.0%} of a pass of the whole model"
        return f"no drafter pays here; the best is {what}: {right}, and {cheap}"


def plan_drafter(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[list[int]],
    new_tokens: int,
    *,
    window: int,
    batch_size: int = 1,
    say: Callable[[str], None] = print,
) -> DrafterPlan:
    """Searches and times drafters, and forecasts what they give.

    Args:
      config: the model, in the dtype that it will run in; exits that it has are not looked at.
      params: its canonical parameters.
      prompts: token ids, all equally long; continued greedily.
      new_tokens: per prompt.
      window: W, at least 2.
      batch_size: rows that are decoded together.
      say: told what is going on.

    Returns:
      The plan.
    """
    require(window >= 2, "window", window, "a drafter needs at least 2")
    config, params = without_exits(config, params)
    say(f"continuing {len(prompts)} prompts")
    texts = continued(Sampler(Decoder(config), params), prompts, new_tokens, len(prompts))
    tokens = np.asarray([[*prompt, *new[:-1]] for prompt, new in texts], np.int32)

    say("looking for the layers that draft best")
    workload = Workload(batch=batch_size, context=tokens.shape[1])
    first = len(prompts[0]) - 1
    found = search_drafters(config, params, tokens, first=first, workload=workload)

    timed = min(found, key=lambda one: abs(one.share - TIMED_SHARE))
    say(f"timing {describe(timed.drafter)}")
    capacity = bucket(tokens.shape[1] + 1 + window)
    costs = _timed(config, params, timed.drafter, batch_size, capacity, window)
    return DrafterPlan(
        tuple(forecast(one, costs, timed.share) for one in found),
        full=costs[0],
        verifying=verifying(costs),
        tokens=tokens[:, first:].size,
    )


def _timed(
    config: ModelConfig, params: Params, drafter: Drafter, batch: int, capacity: int, window: int
) -> tuple[float, ...]:
    """Seconds of rounds with 0 .. W - 1 drafts."""

    model = ServedModels(config, params, 1).with_drafter(drafter)
    prefill = functools.partial(model.prefill, model.config, model.params, capacity=capacity, window=window)
    controls = make_controls(
        model.config, [[1] * 8] * batch, capacity - window - 8, capacity, Settings(ignore_eos=True),
        [None] * batch, lossless=np.ones(batch, bool), adapt=False, fire_share=0.0, together=False,
        tick_costs=(1.0,) * window,
    )  # fmt: skip
    return drafter_costs(model, prefill, controls, (batch, bucket(8)))


def step_seconds(costs: Sequence[float]) -> float:
    """Seconds of a step of the drafter that was timed: what one more draft adds in the widest window."""
    return max(costs[-1] - costs[-2], 0.0)


def verifying(costs: Sequence[float]) -> tuple[float, ...]:
    """Seconds of a verification of 1 .. W positions per row."""
    step = step_seconds(costs)
    return tuple(max(cost - k * step, 1e-9) for k, cost in enumerate(costs))


def forecast(candidate: DraftCandidate, costs: Sequence[float], timed_share: float) -> DrafterForecast:
    """What a drafter is forecast to give.

    Args:
      candidate: the drafter.
      costs: seconds of rounds with 0 .. W - 1 drafts of the drafter that was timed.
      timed_share: share of the layers' cost that this one keeps.
    """
    full, passes = costs[0], verifying(costs)
    slope = max(full - step_seconds(costs), 0.0) / max(1.0 - timed_share, 1e-9)
    step = max(full - slope * (1.0 - candidate.share), 1e-9)
    rates = {0: 1.0 / full}
    expected = 1.0
    for k in range(1, len(costs)):
        expected += candidate.acceptance**k
        rates[k] = expected / (k * step + passes[k])
    drafts = max(rates, key=lambda k: rates[k])
    # The best that drafting gives is told even where it does not pay.
    speedup = full * max(rate for k, rate in rates.items() if k > 0)
    return DrafterForecast(candidate, drafts, speedup, step)


def describe(drafter: Drafter) -> str:
    """A drafter in words: how many attention and MLP blocks it runs."""
    layers = len(drafter.subnet.layers)
    attention, mlps = layers - len(drafter.no_attention), layers - len(drafter.no_mlp)
    return f"{attention} attention and {mlps} MLP blocks of {layers} layers"


def to_json(plan: DrafterPlan) -> dict[str, Any]:
    """The plan as JSON values."""
    rows = [
        {
            "drafter": to_dict(one.candidate.drafter),
            "share": one.candidate.share,
            "similarity": one.candidate.similarity,
            "acceptance": one.candidate.acceptance,
            "drafts": one.drafts,
            "forecast": one.speedup,
            "step": one.step,
        }
        for one in plan.forecasts
    ]
    return {
        "full": plan.full,
        "verifying": list(plan.verifying),
        "tokens": plan.tokens,
        "drafters": rows,
        "verdict": plan.verdict,
    }


def show_plan(plan: DrafterPlan, console: Console) -> None:
    """Prints the drafters and the verdict."""
    times = ", ".join(
        f"{t}: {1e3 * plan.verifying[t - 1]:.1f}" for t in (1, 2, 4, 8) if t <= len(plan.verifying)
    )
    console.print(f"ms of a pass of the whole model by its positions: {times}", soft_wrap=True)
    table = Table(box=rich.box.SIMPLE_HEAD, title="Drafters", title_justify="left")
    for heading in ("runs", "bytes", "ms a step", "drafts right", "drafts a round", "forecast"):
        table.add_column(heading, justify="right")
    for one in plan.forecasts:
        found = one.candidate
        table.add_row(
            describe(found.drafter),
            f"{found.share:.0%}",
            f"{1e3 * one.step:.1f}",
            f"{found.acceptance:.1%}",
            str(one.drafts or "none"),
            f"{one.speedup:.2f}x",
        )
    console.print(table)
    console.print(plan.verdict, soft_wrap=True)

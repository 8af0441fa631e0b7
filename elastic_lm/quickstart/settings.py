"""Ways to decode that are compared with full depth: exits, previews of the head, lossless prompt lookup."""

import dataclasses
from typing import Literal

import jax

from elastic_lm.bench.plan import Plan
from elastic_lm.config.model import ModelConfig
from elastic_lm.decode.options import DecodeOptions
from elastic_lm.depth.forecasting import CPU_FURTHER_POSITION, NO_GAIN, forecast_outcome
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.depth.threshold_search import ExitOutcome
from elastic_lm.nn.preview import HeadPreview

Dial = Literal["exits", "preview", "lookup"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to decode, for a target agreement.

    Attributes:
      dial: what makes it faster.
      target: agreement with the full model that it is for; 1 = lossless.
      agreement: measured on text that nothing was fitted on; 1 by construction where it is lossless.
      predicted: speed-up by the bytes that a token reads; None = known once text is generated.
      policy: of the exits.
      preview: of the vocabulary head.
    """

    dial: Dial
    target: float
    agreement: float
    predicted: float | None = None
    policy: ConfidenceExit | None = None
    preview: HeadPreview | None = None

    @property
    def name(self) -> str:
        """For people, and different for every setting of a run."""
        return name_of(self.dial, self.target)

    def options(self, window: int) -> DecodeOptions:
        """Those of a sampler that decodes in this way.

        Args:
          window: positions whose deeper layers may be pending.
        """
        lossless = self.dial == "lookup"
        return DecodeOptions(
            exit=self.policy, preview=self.preview, lossless=lossless, lookup=lossless, window=window
        )


def name_of(dial: str, target: float) -> str:
    """What people call a dial at a target agreement."""
    return "lossless lookup" if dial == "lookup" else f"{dial} at {100 * target:g} %"


def lookup_pays(plan: Plan | None) -> bool:
    """Whether a plan says that lossless decoding with prompt lookup is faster than full depth."""
    return plan is not None and plan.lookup > NO_GAIN


def further_position(plan: Plan | None) -> float:
    """What a further position of a pass costs relative to the first, in [0, 1].

    Args:
      plan: has measured it, between one position and four; None = as is usual.
    """
    if plan is None or len(plan.seconds) < 4:
        return CPU_FURTHER_POSITION if jax.default_backend() == "cpu" else 0.0
    return min(max((plan.seconds[3] / plan.seconds[0] - 1) / 3, 0.0), 1.0)


def exits_speedup(
    config: ModelConfig, thresholds: tuple[float, ...], outcome: ExitOutcome, window: int, plan: Plan | None
) -> float:
    """What `depth.forecasting` says of exits.

    Args:
      config: the model with its exits.
      thresholds: one per exit.
      outcome: on held-out text.
      window: W.
      plan: knows what a further position costs on this device; None = as is usual.
    """
    further = further_position(plan)
    return forecast_outcome(config, thresholds, outcome, window=window, further=further).speedup


def preview_speedup(plan: Plan, read: float) -> float:
    """1 / (1 - V + V beta), V the head's share of a token's bytes.

    Args:
      plan: knows V.
      read: beta, share of the head's bytes that a token reads.
    """
    return 1 / (1 - plan.head + plan.head * read)

"""Picks one of the ways in which a model can run for a budget of milliseconds and quality, and says why."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_lm.config.checks import require, require_positive
from elastic_lm.config.subnet import Budget

LOSSLESS = "every token the whole model's"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to run a model, with what a token takes and how good it is.

    Attributes:
      name: in words.
      latency_ms: milliseconds per token and row.
      agreement: share of tokens that are the whole model's; None = not known.
      added_loss: nats per token that the loss is above the whole model's; None = not known.
      lossless: every token is the whole model's, whatever the text; the agreement is 1 and the added loss 0.
      measured: the milliseconds were measured as they are, and not forecast from their parts.
      dials: keywords of `Sampler`, such as `exit`, `subnet`, `preview`, `lossless`, `lookup` and `drafter`.
        An `exit` is one of the model that has it.
      command: what is typed to run it; "" = nothing is known.

    Raises:
      ValueError: a number is out of range.

    Example:
      ```python
      import elastic_lm as el

      half = el.Subnet.uniform(el.testing.tiny_config(), mlp=0.5)
      setting = el.Setting("half the neurons", 3.0, agreement=0.93, dials={"subnet": half})
      print(setting)
      ```
    """

    name: str
    latency_ms: float
    agreement: float | None = None
    added_loss: float | None = None
    lossless: bool = False
    measured: bool = False
    dials: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    command: str = ""

    def __post_init__(self) -> None:
        require_positive("setting.latency_ms", self.latency_ms)
        if self.lossless:
            known = self.agreement in (None, 1.0) and self.added_loss in (None, 0.0)
            require(known, "setting.lossless", True, "has agreement=1 and added_loss=0; leave both out")
            object.__setattr__(self, "agreement", 1.0)
            object.__setattr__(self, "added_loss", 0.0)
        known = self.agreement is None or 0 <= self.agreement <= 1
        require(known, "setting.agreement", self.agreement, "must be a share from 0 to 1")
        finite = self.added_loss is None or math.isfinite(self.added_loss)
        require(finite, "setting.added_loss", self.added_loss, "must be a finite number of nats, or None")

    def __str__(self) -> str:
        """The name, the milliseconds and the quality."""
        how = "measured" if self.measured else "forecast"
        if self.lossless:
            quality = [LOSSLESS]
        else:
            quality = [] if self.agreement is None else [_agreement(self.agreement)]
            quality += [] if self.added_loss is None else [f"a loss {self.added_loss:+.3f} nats"]
        return f"{self.name}: {self.latency_ms:.3g} ms a token ({how}), {' and '.join(quality) or 'unknown'}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a budget.

    Attributes:
      setting: the choice.
      reason: why, in words.

    Example:
      ```python
      import elastic_lm as el

      settings = [el.Setting("full depth", 8.0, lossless=True), el.Setting("exits", 5.0, agreement=0.97)]
      choice = el.choose(settings, el.Budget(latency_ms=6, quality=0.95))
      assert choice.setting.name == "exits"
      print(choice.reason)
      ```
    """

    setting: Setting
    reason: str


def choose(settings: Sequence[Setting], budget: Budget) -> Choice:
    """Picks the setting that a budget asks for.

    With milliseconds alone, the best quality that they allow; with quality alone, the fastest that has it;
    with both, the fastest that keeps both. Settings whose quality is not known have none.

    Args:
      settings: of one model on one device, at one batch size. Shares like "70%" are of the whole model at
        full depth: the lossless setting without dials.
      budget: `latency_ms`, `quality`, or both.

    Returns:
      The choice, explained.

    Raises:
      ValueError: the budget is of another cost, or nothing meets it; names what comes nearest.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config()
      settings = [
          el.Setting("full depth", 8.0, lossless=True),
          el.Setting("lookup", 7.0, lossless=True, dials={"lossless": True, "lookup": True}),
          el.Setting("half", 4.5, agreement=0.9, dials={"subnet": el.Subnet.uniform(config, mlp=0.5)}),
      ]
      fastest = el.choose(settings, el.Budget(quality=0.99)).setting
      sampler = el.Sampler(el.Decoder(config), el.testing.random_params(config), **fastest.dials)
      print(el.choose(settings, el.Budget(latency_ms=5)).reason, sampler.options.lookup)
      ```
    """
    require(bool(settings), "settings", settings, "are empty; give some, full depth among them")
    timed = budget.kind in ("latency_ms", "quality")
    require(timed, f"budget.{budget.kind}", budget.given, "settings are compared by latency_ms and quality")
    most = None
    if budget.kind == "latency_ms":
        whole = _full_depth(settings)
        known = budget.share is None or whole is not None
        require(known, "budget.latency_ms", budget.given, "is a share of full depth, which is not there")
        most = budget.of(1.0 if whole is None else whole).amount

    good = [one for one in settings if _good(one, budget)]
    affordable = [one for one in settings if most is None or one.latency_ms <= most]
    both = [one for one in good if one in affordable]
    if not both:
        raise ValueError(_nearest(settings, good, affordable, budget, most))
    if budget.quality is not None:
        chosen = min(both, key=lambda one: (one.latency_ms, -_rank(one)))
    else:
        chosen = max(both, key=lambda one: (_rank(one), -one.latency_ms))
    return Choice(chosen, _reason(chosen, settings, budget, most))


def _full_depth(settings: Sequence[Setting]) -> float | None:
    """Milliseconds of the whole model at full depth; None = it is not among the settings."""
    return next((one.latency_ms for one in settings if one.lossless and not one.dials), None)


def _good(one: Setting, budget: Budget) -> bool:
    """Whether a setting has the quality that is asked for."""
    if budget.agreement is not None:
        return one.agreement is not None and one.agreement >= budget.agreement
    if budget.added_loss is not None:
        return one.added_loss is not None and one.added_loss <= budget.added_loss
    return True


def _rank(one: Setting) -> float:
    """Quality as one number: agreement, and below it the loss where nothing else is known."""
    if one.agreement is not None:
        return one.agreement
    return -math.inf if one.added_loss is None else -one.added_loss


def _agreement(share: float) -> str:
    return f"{share:.1%} of tokens the whole model's"


def _asked(budget: Budget, most: float | None) -> str:
    """The budget in words."""
    parts = [] if most is None else [f"{most:.3g} ms"]
    if budget.agreement is not None:
        parts.append(_agreement(budget.agreement))
    if budget.added_loss is not None:
        parts.append(f"a loss of at most {budget.added_loss:+g} nats")
    return " and ".join(parts)


def _reason(chosen: Setting, settings: Sequence[Setting], budget: Budget, most: float | None) -> str:
    """Why a setting was chosen, and what lies next to it."""
    lines = [f"asked for {_asked(budget, most)}: {chosen}"]
    others = [one for one in settings if one is not chosen]
    if budget.quality is None:
        better = [one for one in others if _rank(one) > _rank(chosen)]
        if better:
            next_one = min(better, key=lambda one: one.latency_ms)
            lines.append(f"the next better, {next_one}, takes longer than is allowed")
    else:
        faster = [one for one in others if one.latency_ms < chosen.latency_ms]
        if faster:
            next_one = max(faster, key=lambda one: (_rank(one), -one.latency_ms))
            lines.append(f"of the faster ones the best, {next_one}, is not good enough")
    whole = _full_depth(settings)
    if whole is not None and whole > chosen.latency_ms:
        lines.append(f"{whole / chosen.latency_ms:.2f} times as fast as full depth")
    return "; ".join(lines)


def _nearest(
    settings: Sequence[Setting],
    good: Sequence[Setting],
    affordable: Sequence[Setting],
    budget: Budget,
    most: float | None,
) -> str:
    """What comes nearest to a budget that nothing meets."""
    near = []
    if good:
        near.append(f"the fastest of that quality is {min(good, key=lambda one: one.latency_ms)}")
    if affordable and budget.quality is not None:
        near.append(f"the best of that speed is {max(affordable, key=_rank)}")
    if not near:
        near.append(f"the fastest is {min(settings, key=lambda one: one.latency_ms)}")
    return f"budget {_asked(budget, most)}: nothing meets it; {'; '.join(near)}; ask for one of them"
